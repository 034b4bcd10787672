"""Continuous batching: sequences come and go at every step, prompts are computed in chunks between the tokens of others.

What a sequence gets does not depend on its company: the engine computes every token in one order, and draws belong to sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..model.transformer import LingForCausalLM
from .engine import PAGE, Engine, StepOutput, why_not
from .packed import Kind
from .pages import PagePool, key_after
from .sampler import GREEDY, Sampling, next_tokens
from .source import source_of_model

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class Job:
    """One sequence: prompt and answer in `ids`, of which the cache holds `computed`. `draws` gives one number in [0, 1) a new token."""

    ids: list[int]
    prompt_tokens: int
    most_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    draws: np.random.Generator
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    finish: FinishReason | None = None

    @property
    def answer(self) -> list[int]:
        """The new tokens."""
        return self.ids[self.prompt_tokens:]


@dataclass(frozen=True)
class Progress:
    """What a step brought to one job: a token, or none when it ended at a stop token; `finish` when it is over."""

    job: Job
    token: int | None
    finish: FinishReason | None


class Scheduler:
    """Runs jobs on an engine. `prefill_tokens`: most prompt tokens in a step; `most_jobs` computed at once, the others wait in order."""

    def __init__(self, engine: Engine, prefill_tokens: int = 512, most_jobs: int = 64) -> None:
        self.engine, self.prefill_tokens, self.most_jobs = engine, prefill_tokens, most_jobs
        self.pool = PagePool(engine.pages)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []

    def submit(self, prompt: Sequence[int], most_tokens: int, sampling: Sampling = GREEDY, stop_ids: Collection[int] = (),
               sequence: int = 0) -> Job:
        """Add a job; it samples with the draws of (seed, `sequence`). Raises `UserError` for a prompt that cannot be computed."""
        config = self.engine.config
        limit = min(self.engine.max_positions, self.engine.pages * PAGE)
        if not prompt:
            raise UserError("prompt: has no tokens; give at least one")
        if len(prompt) >= limit:
            raise UserError(f"prompt: its {len(prompt)} tokens leave no room in a context of {limit}; shorten it")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(f"prompt: holds token ids outside 0 to {config.vocab_size - 1}; use the tokenizer that belongs to the model")
        if most_tokens < 1:
            raise UserError(f"max_new_tokens: {most_tokens} leaves no room for an answer; give 1 or more")
        most_tokens = min(most_tokens, limit - len(prompt))
        draws = np.random.default_rng((sampling.seed, sequence))
        job = Job(list(prompt), len(prompt), most_tokens, sampling, frozenset(stop_ids), draws)
        self.waiting.append(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a job that is not over; its pages are free at once."""
        if job.finish is None:
            self.end(job, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.running)

    def step(self) -> list[Progress]:
        """Compute one batch: a token of every job that answers, and prompt tokens of those that do not yet."""
        self.admit()
        batch = self.choose()
        if not batch:
            return []
        out = self.compute(batch)
        for job, count in batch:
            job.computed += count
            self.remember_pages(job)
        ready = [job for job, _ in batch if job.computed == len(job.ids)]
        return [self.progress_of(job, out.logits[row]) for row, job in enumerate(ready)]

    def admit(self) -> None:
        """Let waiting jobs in while there is room for their whole text so far."""
        while self.waiting and len(self.running) < self.most_jobs:
            job = self.waiting[0]
            found = self.pool.find(job.ids)
            needed = pages_for(len(job.ids) + 1) - len(found)
            if needed > self.pool.available:
                self.pool.release(found)
                return
            self.waiting.popleft()
            job.pages, job.computed = found + self.pool.take(needed), len(found) * PAGE
            job.keys = [self.pool.key_of[page] for page in found]
            job.cached_tokens = max(job.cached_tokens, job.computed)
            self.running.append(job)

    def choose(self) -> list[tuple[Job, int]]:
        """Which jobs compute how many tokens now; pages are there for all of them."""
        batch, budget = [], self.prefill_tokens
        for job in list(self.running):
            if job not in self.running:  # sent back for its pages
                continue
            left = len(job.ids) - job.computed
            count = left if left == 1 else min(left, budget)
            if count and self.make_room(job, job.computed + count):
                batch.append((job, count))
                budget -= count if left > 1 else 0
        return [(job, count) for job, count in batch if job in self.running]

    def make_room(self, job: Job, positions: int) -> bool:
        """Pages for so many positions of the job, taken from the youngest jobs if need be: those begin again later."""
        needed = pages_for(positions) - len(job.pages)
        while needed > self.pool.available:
            youngest = self.running[-1]
            self.send_back(youngest)
            if youngest is job:
                return False
        if needed > 0:
            job.pages += self.pool.take(needed)
        return True

    def send_back(self, job: Job) -> None:
        self.running.remove(job)
        self.give_up_pages(job)
        self.waiting.appendleft(job)

    def give_up_pages(self, job: Job) -> None:
        self.pool.release(job.pages)
        job.pages, job.keys, job.computed = [], [], 0

    def compute(self, batch: list[tuple[Job, int]]) -> StepOutput:
        """One engine step; logits of the jobs that are computed to their end, in order."""
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[int] = []
        for number, (job, count) in enumerate(batch):
            end = job.computed + count
            tokens += job.ids[job.computed:end]
            positions += range(job.computed, end)
            sequences += [number] * count
            if end == len(job.ids):
                wanted.append(len(tokens) - 1)
        tables = np.zeros((len(batch), max(len(job.pages) for job, _ in batch)), dtype=np.int32)
        for number, (job, _) in enumerate(batch):
            tables[number, :len(job.pages)] = job.pages
        return self.engine.step(torch.tensor(tokens), torch.tensor(positions), torch.tensor(sequences), torch.from_numpy(tables),
                                torch.tensor(wanted, dtype=torch.int64))

    def remember_pages(self, job: Job) -> None:
        """Make the pages that are full now known by their text."""
        for number in range(len(job.keys), job.computed // PAGE):
            before = job.keys[-1] if job.keys else b""
            job.keys.append(key_after(before, job.ids[number * PAGE:(number + 1) * PAGE]))
            self.pool.know(job.pages[number], job.keys[-1])

    def progress_of(self, job: Job, logits: Tensor) -> Progress:
        """Choose the next token of a job and see whether it ends."""
        draw = torch.tensor([job.draws.random()], dtype=torch.float64) if job.sampling.temperature > 0 else None
        history = torch.tensor([job.ids]) if job.sampling.repetition_penalty != 1 else None
        token = int(next_tokens(logits[None], history, job.sampling, draw))
        if token in job.stop_ids:
            self.end(job, "stop")
            return Progress(job, None, "stop")
        job.ids.append(token)
        if len(job.ids) - job.prompt_tokens >= job.most_tokens:
            self.end(job, "length")
        return Progress(job, token, job.finish)

    def end(self, job: Job, why: FinishReason) -> None:
        job.finish = why
        if job in self.running:
            self.running.remove(job)
            self.give_up_pages(job)
        else:
            self.waiting.remove(job)


def pages_for(positions: int) -> int:
    return -(-positions // PAGE)


def scheduler_for(model: LingForCausalLM) -> Scheduler | None:
    """A scheduler with room for one full context, on weights as exact as the model's own; None where the engine cannot run it."""
    weight = model.lm_head.weight
    if weight.is_cuda or weight.dtype not in (torch.float32, torch.bfloat16) or why_not(model.config) is not None:
        return None
    kind: Kind = "fp32" if weight.dtype == torch.float32 else "bf16"
    return Scheduler(Engine(source_of_model(model, kind), pages_for(model.config.max_position_embeddings) + 1))


def stream_job(scheduler: Scheduler, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop_ids: Collection[int],
               sequence: int = 0) -> Generator[int, None, None]:
    """The tokens of one answer as they come, alone on the scheduler; closing it cancels the job. Raises `UserError` as `submit` does."""
    job = scheduler.submit(prompt, max_new_tokens, sampling, stop_ids, sequence)
    try:
        while job.finish is None:
            for progress in scheduler.step():
                if progress.token is not None:
                    yield progress.token
    finally:
        scheduler.cancel(job)
