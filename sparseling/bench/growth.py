"""Step time of our model as one thing grows: experts, tokens a step, depth, width, sequence length. One model at a time is built."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..files import write_aside
from ..kernels.choose import DTYPES, describe
from ..progress import bar
from ..train.memory import keep_freed_memory
from ..train.peak import matmul_peak
from .measure import time_in_turn
from .ours import our_candidate
from .picture import curves_picture
from .shapes import Shape, sparse_config
from .train import row

# axis -> what it counts, and where it is measured
AXES = {
    "experts": ("routed experts in a layer, active parameters the same", (8, 16, 32, 64, 128, 256, 512)),
    "tokens": ("tokens a step, sequence length the same", (1024, 2048, 4096, 8192, 16384, 32768)),
    "depth": ("layers", (2, 4, 8, 16)),
    "width": ("hidden size, the experts' width in proportion", (128, 256, 384, 512)),
    "length": ("sequence length, tokens a step the same", (128, 256, 512, 1024, 2048, 4096)),
}
BASE = Shape(sequences=32)  # 16,384 tokens a step


def grown(base: Shape, axis: str, value: int) -> Shape:
    """`base` with one thing set to `value`; tokens are rounded up to whole sequences."""
    if axis == "experts":
        return base.replace(experts=value)
    if axis == "tokens":
        return base.replace(sequences=math.ceil(value / base.seq_length))
    if axis == "depth":
        return base.replace(layers=value)
    if axis == "width":
        return base.replace(hidden=value, width=max(1, round(base.width * value / base.hidden)))
    return base.replace(seq_length=value, sequences=math.ceil(base.tokens / value))


def bench_growth(base: Shape, axes: Sequence[str], dtype: str, threads: int, steps: int, values: Sequence[int] = (),
                 out: Path | None = None) -> dict[str, Any]:
    """Measure the curves of `axes`, at `values` instead of the usual places where given; pictures go to the folder `out`.

    Returns one plain object: points and the fitted exponent for each axis.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be made is seen now and not at the end
    shapes = {axis: {value: grown(base, axis, value) for value in places(base, axis, values)} for axis in axes}
    peak = matmul_peak(DTYPES[dtype])
    curves = {}
    for axis, by_value in shapes.items():
        points = measure_curve(by_value, axis, dtype, steps, peak)
        curves[axis] = {"counts": AXES[axis][0], "exponent": exponent(points), "points": points}
        if out is not None:
            curves[axis]["picture"] = str(draw(axis, curves[axis], out))
    return {
        "matmul_peak_gflops": peak / 1e9, "dtype": dtype, "threads": threads, "steps": steps, "shape": dataclasses.asdict(base),
        "kernels": describe(), "curves": curves,
    }


def places(base: Shape, axis: str, values: Sequence[int]) -> list[int]:
    """Where an axis is measured, in order. A sequence cannot be longer than all tokens of a step, which stay the same: the usual lengths
    end there. Raises `UsageError` for a longer one that was asked for."""
    if axis == "length" and values and max(values) > base.tokens:
        raise UsageError(f"--values: a sequence of {max(values):,} is longer than the {base.tokens:,} tokens of a step, which stay the "
                         "same; give shorter ones, or more --sequences")
    return [value for value in sorted(values or AXES[axis][1]) if values or axis != "length" or value <= base.tokens]


def measure_curve(shapes: dict[int, Shape], axis: str, dtype: str, steps: int, peak: float) -> list[dict[str, Any]]:
    """A row of figures for each value, as `bench train` has them."""
    points = []
    with bar(f"bench growth, {axis}", len(shapes) * (steps + 1)) as line:
        for value, shape in shapes.items():
            config = sparse_config(shape)
            timing = time_in_turn([our_candidate(f"{axis} {value:,}", config, shape, DTYPES[dtype])], steps, line)[f"{axis} {value:,}"]
            points.append({axis: value, "tokens": shape.tokens} | row(config, shape, timing, peak))
            gc.collect()  # the model that was just timed, before the next is built
    return points


def exponent(points: Sequence[dict[str, Any]]) -> float | None:
    """Slope of log(step time) over log(value), by least squares: 1 where time grows in proportion, 0 where it does not grow."""
    axis = next(iter(points[0]))
    x, y = ([math.log(point[key]) for point in points] for key in (axis, "milliseconds_per_step"))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else None


def draw(axis: str, curve: dict[str, Any], out: Path) -> Path:
    """`growth-<axis>.svg` in the folder `out`; returns its path."""
    x = [float(point[axis]) for point in curve["points"]]
    y = [point["milliseconds_per_step"] for point in curve["points"]]
    path = out / f"growth-{axis}.svg"
    with write_aside(path) as stream:
        stream.write(curves_picture(f"Training step time by {axis}", curve["counts"], "milliseconds a step", {axis: (x, y)}))
    return path
