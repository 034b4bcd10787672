"""A whole training step side by side: our model on its fast path, on PyTorch operations, a dense one, and transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ..accounting import count_parameters
from ..config import ModelConfig
from ..errors import UsageError, nearest
from ..kernels.choose import DTYPES, Path, describe
from ..progress import Bar, bar
from ..train.memory import keep_freed_memory
from ..train.peak import matmul_peak
from .measure import Candidate, Timing, profile, time_in_turn
from .ours import our_candidate
from .peers import FINALISTS, finalists, peer_candidates, require_transformers, settings_of
from .shapes import Shape, dense_config, peer_config, sparse_config, useful_flops_per_token

NAMES = ("ours", "reference", "dense", "transformers")
TRIES = 2  # timed steps of each of the peer's settings, before the best ones are measured fully


def bench_train(shape: Shape, dtype: str, threads: int, steps: int, only: Sequence[str] = NAMES, device: str = "cpu") -> dict[str, Any]:
    """Measure the candidates in `only`, `steps` timed steps each, all in `dtype` ("bf16" or "fp32") on a device, at `threads` CPU threads.

    Returns one plain object: a row for each candidate, ratios of our tokens per second to theirs (None where one was left out), the
    matmul peak before and after, and where our step spends its time.
    """
    if not only:
        raise UsageError(f"--only: names nothing to measure; use some of {', '.join(NAMES)}")
    for name in only:
        if name not in NAMES:
            raise UsageError(f"--only: no candidate '{name}'; {nearest(name, NAMES)}")
    if "transformers" in only:
        require_transformers()
    torch.set_num_threads(threads)
    keep_freed_memory()
    before = matmul_peak(DTYPES[dtype], device)
    settings = len(settings_of(dtype)) * (TRIES + 1) + (FINALISTS - 1) * (steps + 1) if "transformers" in only else 0
    with bar("bench train", settings + len(only) * (steps + 1)) as line:
        candidates, tried = build(shape, dtype, only, line, device)
        measured = time_in_turn(candidates, steps, line)
    peaks = [before, matmul_peak(DTYPES[dtype], device)]
    rows = {name: row(config_of(name, shape), shape, measured[name], max(peaks)) for name in NAMES if name in measured}
    if tried:
        rows["transformers"] = row_of_peer(shape, {name: measured[name] for name in tried if name in measured}, tried, max(peaks))
    ours = next((candidate for candidate in candidates if candidate.name == "ours"), None)
    return {
        "matmul_peak_gflops": max(peaks) / 1e9, "matmul_peak_gflops_before_and_after": [flops / 1e9 for flops in peaks],
        "dtype": dtype, "threads": threads, "steps": steps, "shape": dataclasses.asdict(shape), **rows, **ratios(rows),
        "kernels": describe(device), "device": device, "profile": profile(ours.step) if ours else {},
    }


def build(shape: Shape, dtype: str, only: Sequence[str], line: Bar, device: str) -> tuple[list[Candidate], dict[str, Any]]:
    """Our candidates by their names in `only`, the peer's by the names of its fastest settings; and what all its settings did."""
    candidates: list[Candidate] = []
    tried: dict[str, Any] = {}
    if "transformers" in only:
        settings, tried = finalists(shape, dtype, TRIES, line, device)
        candidates += peer_candidates(shape, settings, device)
    for name in only:
        if name != "transformers":
            path: Path = "torch" if name == "reference" else "cpu" if device == "cpu" else "cuda"
            candidates.append(our_candidate(name, config_of(name, shape), shape, DTYPES[dtype], path, device))
    return candidates, tried


def config_of(name: str, shape: Shape) -> ModelConfig:
    """What a candidate computes, for its FLOPs and parameters."""
    return {"dense": dense_config, "transformers": peer_config}.get(name, sparse_config)(shape)


def row(config: ModelConfig, shape: Shape, timing: Timing, peak: float) -> dict[str, Any]:
    """The figures of one candidate, from the median of its steps; `peak` in FLOP/s."""
    speed = shape.tokens / timing.median
    flops = speed * useful_flops_per_token(config, shape.seq_length)
    return {
        "tokens_per_second": speed, "gflops": flops / 1e9, "share_of_peak": flops / peak, "milliseconds_per_step": 1e3 * timing.median,
        "milliseconds_of_steps": [1e3 * seconds for seconds in timing.seconds], "parameters": count_parameters(config).total,
        "loss": timing.values[-1],
    }


def row_of_peer(shape: Shape, measured: dict[str, Timing], tried: dict[str, Any], peak: float) -> dict[str, Any]:
    """The peer's figures in the setting with the fastest median of those that were `measured` fully, and what settings were `tried`."""
    best = min(measured, key=lambda setting: measured[setting].median)
    return row(peer_config(shape), shape, measured[best], peak) | {
        "setting": best, "shared_expert": False, "version": require_transformers().__version__,
        "finalists": {setting: shape.tokens / timing.median for setting, timing in measured.items()}, "tried": tried,
    }


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Our tokens per second over those of each other candidate; None where one of the two was left out."""
    speed = {name: values["tokens_per_second"] for name, values in rows.items()}
    return {f"ratio_to_{name}": speed["ours"] / speed[name] if {"ours", name} <= speed.keys() else None for name in NAMES[1:]}
