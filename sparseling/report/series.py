"""Long series made short enough to draw, without losing what a reader would look for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Points of one line: `x` and `y` are float64 [points]; a NaN in `y` breaks the line."""

    x: np.ndarray
    y: np.ndarray


def curve(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Curve:
    """A `Curve` of the points whose `x` is finite."""
    x_values, y_values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    keep = np.isfinite(x_values)
    return Curve(x_values[keep], y_values[keep])


def join(curves: Sequence[Curve]) -> Curve:
    """One curve after the other, with a break between them (one stage's line does not run into the next)."""
    pieces = [piece for piece in curves if len(piece.x)]
    if not pieces:
        return Curve(np.zeros(0), np.zeros(0))
    x = [part for piece in pieces for part in (piece.x, piece.x[-1:])][:-1]
    y = [part for piece in pieces for part in (piece.y, np.array([np.nan]))][:-1]
    return Curve(np.concatenate(x), np.concatenate(y))


def thin(line: Curve, buckets: int = 200) -> Curve:
    """At most `3 * buckets + 2` points: of every bucket of consecutive points the lowest, the highest and a break if it has one.

    The overall minimum and maximum, and the first and last point, are always kept.
    """
    points = len(line.x)
    if points <= 2 * buckets:
        return line
    finite = np.isfinite(line.y)
    keep = {0, points - 1}
    for piece in np.array_split(np.arange(points), buckets):
        good, bad = piece[finite[piece]], piece[~finite[piece]]
        if len(good):
            keep |= {int(good[np.argmin(line.y[good])]), int(good[np.argmax(line.y[good])])}
        if len(bad):
            keep.add(int(bad[0]))
    order = np.array(sorted(keep))
    return Curve(line.x[order], line.y[order])


def smooth(line: Curve, window: int) -> Curve:
    """The centred moving mean over about `window` points (fewer at the ends), of finite values; NaN stays NaN."""
    half = min(window, len(line.y)) // 2
    if half == 0:
        return line
    finite = np.isfinite(line.y)
    ones = np.ones(2 * half + 1)
    # A direct sum, not a difference of running sums: one huge value must not blur all that come after it.
    total = np.convolve(np.where(finite, line.y, 0.0), ones)[half:-half]
    seen = np.convolve(finite.astype(float), ones)[half:-half]
    return Curve(line.x, np.where(finite, total / np.maximum(1.0, seen), np.nan))


def window_for(points: int) -> int:
    """A smoothing window that leaves some 40 independent values: about a fortieth of the points, at least 1 and at most 500."""
    return int(min(500, max(1, points // 40)))


def bin_columns(x: np.ndarray, values: np.ndarray, columns: int, end: float) -> np.ndarray:
    """Means of `values` [points, rows] in equal steps of `x` from 0 to `end`: [rows, columns], NaN where a column has no point."""
    place = x / end if end > 0 else np.zeros(len(x))
    column = np.clip(place * columns, 0, columns - 1).astype(int)
    clean = np.where(np.isfinite(values), values, np.nan)
    result = np.full((values.shape[1], columns), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column where every value is NaN is NaN, which is what we want
        for index in np.unique(column):
            result[:, index] = np.nanmean(clean[column == index], axis=0)
    return result


def over_layers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest, median and highest layer at every point: `values` [points, layers] to three of [points], NaN where none is finite."""
    # NaN sorts to the end, so the finite values of a row are its first `seen`.
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=1)
    seen = np.isfinite(ordered).sum(axis=1)
    rows = np.arange(len(ordered))
    last = np.maximum(0, seen - 1)
    return ordered[:, 0], (ordered[rows, last // 2] + ordered[rows, (last + 1) // 2]) / 2, ordered[rows, last]
