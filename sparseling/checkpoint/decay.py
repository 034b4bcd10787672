"""WSM: warm-up, stable learning rate, and merging instead of decay (WSM §3; L2 §3.2.3). Decay curves to merge weights.

A weighted mean of checkpoints of a constant-rate run equals one run whose updates were decayed: with g_i the update between checkpoint
i - 1 and i, sum_j c_j theta_j = theta_0 - sum_i w_i g_i where w_i = c_i + ... + c_k. So any decay curve gives merge weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ..errors import UserError, nearest

K = TypeVar("K")
# Learning rate left after the share t of the window (WSM Fig. 2).
CURVES = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2.0,
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
    "ema": lambda t: 1.0 - 0.1 ** (1.0 - t),
}


def merge_weights(curve: str | Sequence[float], checkpoints: int) -> list[float]:
    """Weights c_0..c_k of `checkpoints` = k + 1 checkpoints, oldest first; they are >= 0 and sum to 1 (WSM Theorem 3.1).

    curve: 'mean', 'linear', 'cosine', '1-sqrt', 'ema' (sampled at i / (k + 1), i = 1..k), or the k decay factors w_1 >= ... >= w_k
    themselves, within [0, 1]. Then c_k = w_k, c_j = w_j - w_(j+1), c_0 = 1 - w_1. 'mean' equals 'linear'.
    Raises `UserError` for an unknown curve, a wrong number of factors, or factors that rise or leave [0, 1].
    """
    if checkpoints < 1:
        raise UserError(f"checkpoints: {checkpoints} cannot be merged; give at least one")
    if curve == "mean":
        return [1.0 / checkpoints] * checkpoints
    if isinstance(curve, str):
        if curve not in CURVES:
            raise UserError(f"curve: '{curve}' is unknown; {nearest(curve, ['mean', *CURVES])}")
        decay = [CURVES[curve](i / checkpoints) for i in range(1, checkpoints)]
    else:
        decay = check_decay(curve, checkpoints)
    steps = [1.0, *decay, 0.0]
    return [before - after for before, after in itertools.pairwise(steps)]


def check_decay(curve: Sequence[float], checkpoints: int) -> list[float]:
    """The k factors of a custom curve as floats, or a `UserError` that says which one is wrong."""
    if len(curve) != checkpoints - 1:
        raise UserError(f"curve: has {len(curve)} factors, {checkpoints} checkpoints need {checkpoints - 1}, one per update between them")
    decay = [float(factor) for factor in curve]
    for number, (before, factor) in enumerate(itertools.pairwise([1.0, *decay]), start=1):
        if not 0.0 <= factor <= before:  # false for NaN too
            raise UserError(f"curve: factor {number} is {factor}, expected a number from 0 to {before}; a decay curve falls from 1 to 0")
    return decay


def choose_top(scores: Mapping[K, float], count: int) -> list[K]:
    """The `count` checkpoints with the lowest validation bits per byte, in the order of `scores` (time order). All when there are fewer.

    L2 §3.2.3 merges the top 32 of late mid-training. Of equal scores the later wins; NaN (a diverged checkpoint) is never chosen.
    """
    if count < 1:
        raise UserError(f"top: {count} checkpoints cannot be merged; choose at least 1")
    order = {checkpoint: number for number, checkpoint in enumerate(scores)}
    usable = [checkpoint for checkpoint, score in scores.items() if math.isfinite(score)]
    if not usable:
        raise UserError("top: no checkpoint has a finite validation score; look at the loss curve of the run")
    best = sorted(usable, key=lambda checkpoint: (scores[checkpoint], -order[checkpoint]))[:count]
    return sorted(best, key=order.__getitem__)
