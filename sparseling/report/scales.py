"""Where a value stands on an axis, and which ticks a reader gets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .words import count, trimmed

LARGEST = 1e200  # beyond it differences overflow; such values are not drawn
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high` with labelled `ticks`; logarithmic when `log`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """The value's place along the axis: 0 at `low`, 1 at `high`; NaN where it cannot stand (not finite, or <= 0 on a log axis)."""
        if not drawable(value) or (self.log and value <= 0):
            return math.nan
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def drawable(value: float) -> bool:
    """True for a finite number that is small enough to subtract from another."""
    return math.isfinite(value) and abs(value) <= LARGEST


def value_scale(values: Iterable[float], zero: bool = False, log: bool = False, top: float | None = None) -> Scale:
    """A vertical axis whose outer ticks enclose all drawable `values`.

    `zero` makes it start at 0, `top` is a value that it must reach, `log` asks for a logarithmic axis, which is granted when all
    values are positive and span more than a factor of 30.
    """
    found = _drawable(values)
    if top is not None:
        found = np.append(found, top)
    if zero:
        found = np.append(found, 0.0)
    if not len(found):
        found = np.array([0.0, 1.0])
    low, high = float(found.min()), float(found.max())
    if log and low > 1 / LARGEST and high / low > 30:
        return _log_scale(low, high)
    low, high = _apart(low, high)
    step = nice_step((high - low) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(index * step for index in range(first, last + 1))
    return Scale(min(ticks[0], low), max(ticks[-1], high), ticks, tuple(tick_label(tick, step) for tick in ticks))


def run_scale(values: Iterable[float]) -> Scale:
    """A horizontal axis from 0 (or the smallest value, where that is negative) to the largest: the last tick may fall short of its end."""
    found = _drawable(values)
    low, high = _apart(min(0.0, float(found.min())), float(found.max())) if len(found) else (0.0, 1.0)
    step = nice_step((high - low) / 5)
    ticks = tuple(index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Scale(low, high, ticks, tuple(count(tick, 4) for tick in ticks))


def nice_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in _STEPS if step * power >= rough * (1 - 1e-9))


def tick_label(value: float, step: float) -> str:
    """A tick with just the digits that tell it from its neighbours, `step` away, and a true minus sign."""
    if step >= 1000:
        text = count(value, 4 + max(0, math.ceil(math.log10(max(abs(value), step) / step)) - 2))
    elif step < 1e-4:
        text = _power_of_ten(value, step)
    else:
        text = trimmed(value, max(0, -math.floor(math.log10(step) + 1e-9)) + 1, ",")
    return f"−{text[1:]}" if text.startswith("-") else text


def _power_of_ten(value: float, step: float) -> str:
    if abs(value) < step / 2:
        return "0"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    digits = power - math.floor(math.log10(step) + 1e-9) + 1
    return f"{trimmed(value / 10.0**power, digits)}e{power}"


def _log_scale(low: float, high: float) -> Scale:
    """Ticks at 1, 2, 5 times powers of ten over two decades or fewer, else at powers of ten, else at every n-th power."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((top - bottom) / 6))
    digits = (1, 2, 5) if top - bottom <= 2 else (1,)
    candidates = [digit * 10.0**power for power in range(bottom, top + stride, stride) for digit in digits]
    first = max(index for index, tick in enumerate(candidates) if tick <= low or index == 0)
    last = next((index for index, tick in enumerate(candidates) if tick >= high), len(candidates) - 1)
    ticks = tuple(candidates[first : last + 1])
    return Scale(min(ticks[0], low), max(ticks[-1], high), ticks, tuple(tick_label(tick, tick) for tick in ticks), log=True)


def _drawable(values: Iterable[float]) -> np.ndarray:
    found = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=float).ravel()
    with np.errstate(invalid="ignore"):
        return found[np.isfinite(found) & (np.abs(found) <= LARGEST)]


def _apart(low: float, high: float) -> tuple[float, float]:
    """Widen a range that is too narrow to divide (a constant series)."""
    size = max(abs(low), abs(high))
    if high - low > max(1e-9 * size, 1 / LARGEST):
        return low, high
    pad = 0.05 * size if size > 1 / LARGEST else 1.0
    return low - pad if low else low, high + pad
