"""The next token of many sequences at once: each row adjusted by its own rules, then all drawn in one call.

A row's token depends on its logits, its job and its own draw alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .history import log_probabilities
from .job import Job
from .sampler import NOT_FINITE, can_draw, draw, next_tokens

NOTHING_FITS = "constraint: no token can continue the answer; loosen the grammar"


class Drawn(NamedTuple):
    """A chosen token, or why there is none (`failure`); with log-probabilities where the job wants them."""

    token: int
    failure: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def draw_tokens(jobs: Sequence[Job], logits: Tensor) -> list[Drawn]:
    """The next token of each job; logits [jobs, vocab] float32 are overwritten."""
    rows = logits.numpy()
    drawn = [Drawn(-1)] * len(jobs)
    raw: dict[int, np.ndarray] = {}
    sampled: list[int] = []
    for number, job in enumerate(jobs):
        row = rows[number]
        if job.top_logprobs is not None:
            raw[number] = row.copy()
        if job.history is not None:
            job.history.adjust(row)
        if job.constraint is not None:
            row[~job.constraint.allowed()] = -math.inf
        best = int(row.argmax())                                                 # the first of the best; NaN if there is one
        if not math.isfinite(row[best]):
            drawn[number] = Drawn(-1, NOT_FINITE if job.constraint is None else NOTHING_FITS)
        elif job.sampling.greedy:
            drawn[number] = Drawn(best)
        else:
            sampled.append(number)
    for number, token in zip(sampled, sampled_tokens(jobs, logits, sampled), strict=True):
        drawn[number] = Drawn(token)
    for number, row in raw.items():
        if not drawn[number].failure:
            logprob, best_tokens = log_probabilities(row, drawn[number].token, jobs[number].top_logprobs or 0)
            drawn[number] = Drawn(drawn[number].token, "", logprob, best_tokens)
    return drawn


def sampled_tokens(jobs: Sequence[Job], logits: Tensor, numbers: list[int]) -> list[int]:
    """Of the rows with these numbers, in one call where the kernel is there."""
    if not numbers:
        return []
    draws = torch.tensor([jobs[number].draws.random() for number in numbers], dtype=torch.float64)
    if can_draw():
        return draw(logits, torch.tensor(numbers), [jobs[number].sampling for number in numbers], draws).tolist()
    return [int(next_tokens(logits[number:number + 1], None, jobs[number].sampling, draws[n:n + 1])) for n, number in enumerate(numbers)]
