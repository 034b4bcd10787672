"""Speculative decoding with the MTP layer: it guesses the tokens after the next one, and the next step checks the guesses.

A guess is accepted when the sequence draws that very token from the model's own logits, with the draw that it would have used anyway.
So what is said is what would have been said without guesses, token by token: only the number of steps changes. Whether that is faster
depends on the model and the machine (two tokens use almost disjoint experts), so it is measured as it goes, and left where it does not pay.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .batch import Part
from .engine import PAGE, Engine

SAMPLES = 24        # steps that a verdict looks back at
ENOUGH = 8          # of them before there is one
PROBE_EVERY = 16    # steps with guesses, to one without
RETRY_EVERY = 32    # jobs without guesses, to one with
WORTH = 1.02        # times as fast, to go on


@dataclass
class Cost:
    """Seconds per new token of recent steps at one number of sequences, with guesses and without."""

    guessing: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    plain: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    steps: int = 0
    refused: int = 0

    @property
    def gain(self) -> float | None:
        """How many times as fast guessing is; None until enough is known."""
        if len(self.guessing) < ENOUGH or len(self.plain) < ENOUGH // 2:
            return None
        return statistics.median(self.plain) / statistics.median(self.guessing)


@dataclass
class Look:
    """What the MTP layer is asked next: tokens at positions of sequences; logits for rows `asking`, each with its part's number."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    asking: list[tuple[int, int]] = field(default_factory=list)


class Speculator:
    """Guesses `drafts` tokens a step for every job that lets it, from the likeliest of the first `vocab_size` words (None: all).

    `always`: go on where it does not pay. `proposed` and `accepted` count guesses, by their place after the next token.
    """

    def __init__(self, engine: Engine, drafts: int = 1, vocab_size: int | None = None, always: bool = False) -> None:
        assert engine.ahead and drafts > 0
        self.engine, self.drafts, self.vocab_size, self.always = engine, drafts, vocab_size, always
        self.costs: dict[int, Cost] = {}
        self.proposed = np.zeros(drafts, dtype=np.int64)
        self.accepted = np.zeros(drafts, dtype=np.int64)

    @property
    def acceptance(self) -> float:
        """The share of guesses that were right."""
        return float(self.accepted.sum() / max(1, self.proposed.sum()))

    def cost(self, jobs: int) -> Cost:
        """What is known about so many sequences; numbers between the same powers of two share it."""
        return self.costs.setdefault(jobs.bit_length(), Cost())

    def accepts(self, jobs: int) -> bool:
        """Whether a job that makes it so many is to be guessed for."""
        cost = self.cost(jobs)
        if self.always or cost.gain is None or cost.gain >= WORTH:
            return True
        cost.refused += 1
        return cost.refused % RETRY_EVERY == 0

    def guesses_now(self, jobs: int) -> bool:
        """Whether this step checks guesses; now and then one does not, so that the cost of both is known."""
        cost = self.cost(jobs)
        cost.steps += 1
        return self.always or cost.steps % PROBE_EVERY != 0

    def learn(self, parts: Sequence[Part], tokens: int, plain_seconds: float, seconds: float) -> None:
        """Note what a step cost that gave so many tokens: `plain_seconds` without the guessing for the next one."""
        for part in parts:
            self.proposed[:part.drafts] += 1
            self.accepted[:part.accepted] += 1
        if any(part.count - part.drafts > 1 for part in parts) or not tokens:  # prompts were computed, too
            return
        cost = self.cost(len(parts))
        if any(part.drafts for part in parts):
            cost.guessing.append(seconds / tokens)
        else:
            cost.plain.append(plain_seconds / tokens)
        if len(cost.guessing) >= ENOUGH and cost.gain is not None and cost.gain < WORTH and not self.always:
            for part in parts:  # its keys and values end here: there is no way back for these
                part.job.speculates = False

    def propose(self, parts: Sequence[Part], hidden: Tensor, tables: Tensor) -> None:
        """Take the MTP layer over what a step computed, and guess for the jobs that go on. `hidden` [rows, hidden] and `tables` are
        those of the step."""
        rows: list[int] = []
        look = Look()
        for number, part in enumerate(parts):
            job = part.job
            if job.finish is not None or not job.speculates or not job.pages:
                continue
            rows += range(part.row, part.row + job.computed - part.start)
            look.tokens += job.ids[part.start + 1:job.computed + 1]
            look.positions += range(part.start, job.computed)
            look.sequences += [number] * (job.computed - part.start)
            if job.computed == len(job.ids) - 1 and self.room(part) > 0:
                look.asking.append((len(rows) - 1, number))
        states = hidden[rows]
        while look.tokens:
            wanted = torch.tensor([row for row, _ in look.asking], dtype=torch.int64)
            out = self.engine.look_ahead(states, torch.tensor(look.tokens), torch.tensor(look.positions), torch.tensor(look.sequences),
                                         tables, wanted, self.vocab_size)
            assert out.hidden is not None
            guesses = out.logits.numpy().argmax(axis=1).tolist()
            states, look = self.deeper(parts, look, guesses, out.hidden)

    def deeper(self, parts: Sequence[Part], look: Look, guesses: Sequence[int], hidden: Tensor) -> tuple[Tensor, Look]:
        """Note the guesses; then the states and the look from which the next ones come, of jobs with room for more."""
        rows: list[int] = []
        after = Look()
        for (row, number), guess in zip(look.asking, guesses, strict=True):
            job = parts[number].job
            job.drafts.append(guess)
            if len(job.drafts) < self.room(parts[number]):
                after.asking.append((len(rows), number))
                rows.append(row)
                after.tokens.append(guess)
                after.positions.append(job.computed - 1 + len(job.drafts))
                after.sequences.append(number)
        return hidden[rows], after

    def room(self, part: Part) -> int:
        """How many guesses may follow: within the answer's length, the context, and the pages at hand."""
        job = part.job
        left = job.most_tokens - (len(job.ids) - job.prompt_tokens) - 1
        return min(self.drafts, left, len(job.pages) * PAGE - job.computed, self.engine.max_positions - len(job.ids))
