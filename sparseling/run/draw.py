"""The next token of many sequences at once: each row adjusted by its own rules, rows that are drawn alike drawn together.

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
from .sampler import NOT_FINITE, Sampling, next_tokens

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
    together: dict[Sampling, list[int]] = {}
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
            together.setdefault(job.drawing, []).append(number)
    for sampling, numbers in together.items():
        draws = torch.tensor([jobs[number].draws.random() for number in numbers], dtype=torch.float64)
        tokens = next_tokens(logits if len(numbers) == len(jobs) else logits[numbers], None, sampling, draws)
        for number, token in zip(numbers, tokens.tolist(), strict=True):
            drawn[number] = Drawn(token)
    for number, row in raw.items():
        if not drawn[number].failure:
            logprob, best_tokens = log_probabilities(row, drawn[number].token, jobs[number].top_logprobs or 0)
            drawn[number] = Drawn(drawn[number].token, "", logprob, best_tokens)
    return drawn
