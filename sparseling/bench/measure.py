"""Timing: candidates in turn, the matmul peak that speeds are a share of, and where a step spends its time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..progress import Bar

PEAK_SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 256, 512))  # rows, inner, columns
PEAK_SECONDS = 0.25  # for each size and way to multiply


@dataclass(frozen=True)
class Candidate:
    """Something to time. `step` returns a number that is kept beside its time (a loss, or seconds of a part)."""

    name: str
    step: Callable[[], float]


@dataclass
class Timing:
    """Repetitions of one candidate: seconds, and what `step` returned. `failure` says why there are none."""

    seconds: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_in_turn(candidates: Sequence[Candidate], repetitions: int, line: Bar, may_fail: bool = False) -> dict[str, Timing]:
    """Time every candidate `repetitions` times, one after the other in rounds, so that a busy machine slows all alike.

    Each is run once before, untimed; every round starts with the next candidate. `line` advances by one a run. With `may_fail` one
    that raises is dropped and the reason kept.
    """
    timings = {candidate.name: Timing() for candidate in candidates}
    for round_number in range(repetitions + 1):
        first = round_number % max(1, len(candidates))
        for candidate in [*candidates[first:], *candidates[:first]]:
            timing = timings[candidate.name]
            line.note(candidate.name)
            if not timing.failure:
                try:
                    run_once(candidate, timing, keep=round_number > 0)
                except Exception as error:
                    if not may_fail:
                        raise
                    timing.failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            line.advance()
    return timings


def run_once(candidate: Candidate, timing: Timing, keep: bool) -> None:
    """One run; its time and value are kept when told."""
    start = time.perf_counter()
    value = candidate.step()
    seconds = time.perf_counter() - start
    if keep:
        timing.seconds.append(seconds)
        timing.values.append(value)


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest matrix product of `PEAK_SIZES` in `dtype`, by torch.mm or straight through oneDNN, at torch's threads."""
    best = 0.0
    for rows, inner, columns in PEAK_SIZES:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        for product in ways_to_multiply(a, b, out):
            best = max(best, 2 * rows * inner * columns / fastest(product))
    return best


def ways_to_multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> list[Callable[[], object]]:
    """Products of a [rows, inner] and b [columns, inner] that this torch offers; those that do not run are left out."""
    plain = b.t().contiguous()
    ways: list[Callable[[], object]] = [
        lambda: torch.mm(a, plain, out=out),
        lambda: torch.mm(a, b.t(), out=out),
        lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    ]
    return [way for way in ways if runs(way)]


def runs(function: Callable[[], object]) -> bool:
    try:
        function()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def fastest(function: Callable[[], object]) -> float:
    """Seconds of the fastest call within `PEAK_SECONDS`."""
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < PEAK_SECONDS:
        before = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - before)
    return best


def profile(step: Callable[[], object], top: int = 12) -> dict[str, float]:
    """Share of one step's time by operation, its own time without that of operations inside it; the `top` largest, largest first."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own start and end on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        step()
    own = {event.key: float(event.self_cpu_time_total) for event in record.key_averages()}
    total = sum(own.values()) or 1.0
    return {name: own[name] / total for name in sorted(own, key=lambda name: -own[name])[:top]}
