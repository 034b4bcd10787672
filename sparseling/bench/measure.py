"""Timing: candidates in turn, and where a step spends its time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..progress import Bar
from ..train.device import wait_for_device


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
    wait_for_device()
    start = time.perf_counter()
    value = candidate.step()
    wait_for_device()
    seconds = time.perf_counter() - start
    if keep:
        timing.seconds.append(seconds)
        timing.values.append(value)


def profile(step: Callable[[], object], top: int = 12) -> dict[str, float]:
    """Share of one step's time by operation, its own time without that of operations inside it; the `top` largest, largest first.

    Where a GPU is in use, its kernels' time.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own start and end on stderr
    on_gpu = torch.cuda.is_initialized()
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as record:
        step()
        wait_for_device()
    own = {e.key: float(e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in record.key_averages()}
    total = sum(own.values()) or 1.0
    return {name: own[name] / total for name in sorted(own, key=lambda name: -own[name])[:top]}
