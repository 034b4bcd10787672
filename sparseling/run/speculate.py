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

from .batch import Portion, integers
from .engine import PAGE, Engine
from .job import Job
from .packed import BLOCK_ROWS, round_up

DRAFTS = 3          # guesses a step
SAMPLES = 24        # steps that a verdict looks back at
ENOUGH = 8          # of them before there is one
PROBE_EVERY = 16    # steps with guesses, to one without
RETRY_EVERY = 32    # jobs without guesses, to one with
WORTH = 1.02        # times as fast, to go on
CHOOSE_EVERY = 512  # tokens between two looks at which words are said
COVERED = 0.998     # of the tokens: what the chosen words have to make up


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


class Words:
    """The part of the vocabulary that guesses are chosen from, in blocks of 16 words: those in which nearly all of the recent tokens lie,
    for a guess costs a product with the whole head otherwise."""

    def __init__(self, vocab_size: int) -> None:
        count = round_up(vocab_size, BLOCK_ROWS) // BLOCK_ROWS
        self.seen = [0.0] * count
        self.tokens = 0
        self.blocks = torch.arange(count)

    def learn(self, ids: Sequence[int]) -> None:
        """Tokens that were read or said."""
        for token in ids:
            self.seen[token // BLOCK_ROWS] += 1.0
        self.tokens += len(ids)
        if self.tokens >= CHOOSE_EVERY:
            self.choose()

    def choose(self) -> None:
        """Take the fewest blocks that hold `COVERED` of what was seen; what was seen long ago counts less and less."""
        seen = np.array(self.seen)
        order = np.argsort(-seen, kind="stable")
        mass = seen[order].cumsum()
        needed = int(np.searchsorted(mass, COVERED * mass[-1])) + 1
        self.blocks = torch.from_numpy(np.sort(order[:needed]))
        self.seen = (seen / 2).tolist()
        self.tokens = 0


class Speculator:
    """Guesses up to `drafts` tokens a step for every job that lets it.

    `always`: go on where it does not pay. `proposed` and `accepted` count guesses, by their place after the next token.
    """

    def __init__(self, engine: Engine, drafts: int = DRAFTS, always: bool = False) -> None:
        assert engine.ahead and drafts > 0
        self.engine, self.drafts, self.always = engine, drafts, always
        self.words = Words(engine.config.vocab_size)
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

    def learn(self, parts: Sequence[Portion], tokens: int, plain_seconds: float, seconds: float) -> None:
        """Note what a step cost that gave so many tokens: `plain_seconds` without the guessing for the next one."""
        for part in parts:
            self.proposed[:part.drafts] += 1
            self.accepted[:part.accepted] += 1
            self.words.learn(part.job.ids[part.start + 1:part.job.computed + 1])
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

    def propose(self, parts: Sequence[Portion], hidden: Tensor, tables: Tensor) -> None:
        """Take the MTP layer over what a step computed, and guess for the jobs that go on. `hidden` [rows, hidden] and `tables` are
        those of the step."""
        rows: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[int] = []
        rooms: list[int] = []
        asking: list[Job] = []
        for number, part in enumerate(parts):
            job = part.job
            if job.finish is not None or not job.speculates or not job.pages:
                continue
            rows += range(part.row, part.row + job.computed - part.start)
            tokens += job.ids[part.start + 1:job.computed + 1]
            positions += range(part.start, job.computed)
            sequences += [number] * (job.computed - part.start)
            if job.computed == len(job.ids) - 1 and (room := self.room(job)) > 0:
                wanted.append(len(rows) - 1)
                rooms.append(room)
                asking.append(job)
        if not rows:
            return
        states = hidden if len(rows) == len(hidden) else hidden[rows]
        guesses = self.engine.guess(states, integers(tokens), integers(positions), integers(sequences), tables, integers(wanted),
                                    integers(rooms), self.drafts, self.words.blocks)
        for job, room, row in zip(asking, rooms, guesses.tolist(), strict=True):
            job.drafts = row[:room]

    def room(self, job: Job) -> int:
        """How many guesses may follow: within the answer's length, the context, and the pages at hand."""
        left = job.most_tokens - (len(job.ids) - job.prompt_tokens) - 1
        return min(self.drafts, left, len(job.pages) * PAGE - job.computed + 1, self.engine.max_positions - len(job.ids))


def speculator_for(engine: Engine, drafts: int = DRAFTS) -> Speculator | None:
    """None for an engine without an MTP layer, or for no guesses."""
    return Speculator(engine, drafts) if engine.ahead and drafts else None
