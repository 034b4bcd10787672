"""Continuous batching: sequences come and go at every step, prompts are computed in chunks between the tokens of others.

What a sequence gets does not depend on its company: the engine computes every token in one order, and draws belong to sequences.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..model.transformer import LingForCausalLM
from .batch import Portion, add_hidden, batch_of, expert_counts, routing_rows
from .draw import Drawn, draw_tokens
from .engine import PAGE, Engine, StepOutput, why_not
from .job import Constraint, FinishReason, Job, Progress, RoutingOf, RoutingRows
from .packed import Kind
from .pages import PagePool, key_after
from .sampler import GREEDY, Sampling
from .source import source_of_model
from .speculate import Speculator, speculator_for

WITH_GUESSES = b"with guesses"  # what the keys begin with of pages that hold keys and values of the MTP layer, too


class Scheduler:
    """Runs jobs on an engine. `prefill_tokens`: most prompt tokens in a step; `most_jobs` computed at once, the others wait in order.

    With `count_experts`, `expert_counts` [MoE layers, experts] says how often each expert was used since the start, by `tokens_read`.
    """

    def __init__(self, engine: Engine, prefill_tokens: int = 512, most_jobs: int = 64, count_experts: bool = False,
                 speculator: Speculator | None = None) -> None:
        self.speculator = speculator
        self.engine, self.prefill_tokens, self.most_jobs, self.count_experts = engine, prefill_tokens, most_jobs, count_experts
        self.expert_counts = np.zeros((engine.moe_layers, engine.config.num_experts), dtype=np.int64)
        self.tokens_read = 0
        self.pool = PagePool(engine.pages)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []

    def submit(self, prompt: Sequence[int], most_tokens: int, sampling: Sampling = GREEDY, stop_ids: Collection[int] = (),
               sequence: int = 0, top_logprobs: int | None = None, routing: RoutingOf = "nothing",
               constraint: Constraint | None = None) -> Job:
        """Add a job; it samples with the draws of (seed, `sequence`).

        `top_logprobs`: report the log-probability of every new token and of so many likeliest ones. `routing`: report that of the answer's
        tokens, or of all; with "all" the prompt is computed anew, whatever is known of it. Raises `UserError` for a prompt that cannot be
        computed, or settings that do not fit the model.
        """
        most_tokens = self.checked(prompt, most_tokens, sampling)
        draws = np.random.default_rng((sampling.seed, sequence))
        job = Job(list(prompt), len(prompt), most_tokens, sampling, frozenset(stop_ids), draws, top_logprobs, routing, constraint)
        self.waiting.append(job)
        return job

    def submit_embedding(self, prompt: Sequence[int]) -> Job:
        """Add a job that only reads; at its end `hidden_sum` is the sum of the prompt's final hidden states. Raises as `submit` does."""
        self.checked(prompt, 1, GREEDY)
        hidden_sum = np.zeros(self.engine.config.hidden_size)
        job = Job(list(prompt), len(prompt), 1, GREEDY, frozenset(), np.random.default_rng(0), hidden_sum=hidden_sum)
        self.waiting.append(job)
        return job

    def checked(self, prompt: Sequence[int], most_tokens: int, sampling: Sampling) -> int:
        """How many tokens there is room for. Raises `UserError` as `submit` does."""
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
        if any(token >= config.vocab_size for token, _ in sampling.logit_bias):
            raise UserError(f"logit_bias: holds token ids above {config.vocab_size - 1}; use the tokenizer that belongs to the model")
        return min(most_tokens, limit - len(prompt))

    def cancel(self, job: Job) -> None:
        """End a job that is not over; its pages are free at once."""
        if job.finish is None:
            self.end(job, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.running)

    def step(self) -> list[Progress]:
        """Compute one batch: a token or more of every job that answers, and prompt tokens of those that do not yet."""
        start = time.perf_counter()
        self.admit()
        parts = self.choose()
        if not parts:
            return []
        batch = batch_of(parts)
        guessing = self.speculator is not None and any(part.job.speculates for part in parts)
        shown = any(part.job.routing != "nothing" for part in parts)
        out = self.engine.step(batch.tokens, batch.positions, batch.sequences, batch.tables, batch.wanted,
                               guessing or any(part.job.hidden_sum is not None for part in parts), shown or self.count_experts, shown)
        progress = self.read(parts, out)
        if self.speculator is not None and out.hidden is not None:
            plain_seconds = time.perf_counter() - start
            self.speculator.propose(parts, out.hidden, batch.tables)
            self.speculator.learn(parts, sum(entry.token is not None for entry in progress), plain_seconds, time.perf_counter() - start)
        return progress

    def read(self, parts: list[Portion], out: StepOutput) -> list[Progress]:
        """Draw the next tokens from a step's logits: one for every part that answers, and one more after each guess that was right."""
        progress: list[Progress] = []
        drawing: list[Portion] = []
        for part in parts:
            answers = part.answers
            add_hidden(part, out)
            part.job.computed += part.count - part.drafts
            self.remember_pages(part.job)
            if answers:
                drawing.append(part)
            elif (rows := routing_rows(part, out)) is not None:
                progress.append(Progress(part.job, None, None, routing=rows))
        while drawing:
            drawn = draw_tokens([part.job for part in drawing], rows_of(out.logits, [part.logits + part.accepted for part in drawing]))
            guesses = [part.job.drafts[part.accepted] if part.accepted < part.drafts else None for part in drawing]
            progress += [self.progress_of(part.job, new, routing_rows(part, out)) for part, new in zip(drawing, drawn, strict=True)]
            right = [new.token == guess for new, guess in zip(drawn, guesses, strict=True)]
            drawing = [part for part, so in zip(drawing, right, strict=True) if so and part.job.finish is None]
            for part in drawing:
                part.accepted += 1
                part.job.computed += 1
                self.remember_pages(part.job)
        for part in parts:
            part.job.drafts = []
        if self.count_experts:
            counts, tokens = expert_counts(parts, out, self.engine.config.num_experts)
            self.expert_counts += counts
            self.tokens_read += tokens
        return progress

    def admit(self) -> None:
        """Let waiting jobs in while there is room for their whole text so far."""
        while self.waiting and len(self.running) < self.most_jobs:
            job = self.waiting[0]
            if job.speculates is None:
                job.speculates = self.speculates(job)
                job.first_key = WITH_GUESSES if job.speculates else b""
            found = self.pool.find(job.ids[:reusable(job)], job.first_key)
            needed = pages_for(len(job.ids) + 1) - len(found)
            if needed > self.pool.available:
                self.pool.release(found)
                return
            self.waiting.popleft()
            job.pages, job.computed = found + self.pool.take(needed), len(found) * PAGE
            job.keys = [self.pool.key_of[page] for page in found]
            job.cached_tokens = max(job.cached_tokens, job.computed)
            self.running.append(job)

    def speculates(self, job: Job) -> bool:
        """Whether a job that is let in is to be guessed for."""
        return self.speculator is not None and job.hidden_sum is None and self.speculator.accepts(len(self.running) + 1)

    def choose(self) -> list[Portion]:
        """Which jobs compute how many tokens now; pages are there for all of them."""
        parts, budget = [], self.prefill_tokens
        guesses_now = self.speculator is not None and self.speculator.guesses_now(len(self.running))
        for job in list(self.running):
            if not job.pages:  # sent back
                continue
            left = len(job.ids) - job.computed
            count = left if left == 1 else min(left, budget)
            if count and self.make_room(job, job.computed + count):
                drafts = self.checked_drafts(job) if left == 1 and guesses_now else 0
                parts.append(Portion(job, count + drafts, drafts))
                budget -= count if left > 1 else 0
        return [part for part in parts if part.job.pages]

    def checked_drafts(self, job: Job) -> int:
        """How many of a job's guesses there is room for without sending anybody back; their pages are taken."""
        needed = pages_for(len(job.ids) + len(job.drafts)) - len(job.pages)
        if needed > self.pool.available:
            return 0
        if needed > 0:
            job.pages += self.pool.take(needed)
        return len(job.drafts)

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
        if job.hidden_sum is not None:  # all of it is read again
            job.hidden_sum[:] = 0
        job.speculates = None
        self.waiting.appendleft(job)

    def give_up_pages(self, job: Job) -> None:
        self.pool.release(job.pages)
        job.pages, job.keys, job.computed, job.drafts = [], [], 0, []

    def remember_pages(self, job: Job) -> None:
        """Make the pages that are full now known by their text; those that the MTP layer has been over apart from others."""
        if job.first_key == WITH_GUESSES and not job.speculates:  # it has not been over these
            return
        for number in range(len(job.keys), job.computed // PAGE):
            before = job.keys[-1] if job.keys else job.first_key
            job.keys.append(key_after(before, job.ids[number * PAGE:(number + 1) * PAGE]))
            self.pool.know(job.pages[number], job.keys[-1])

    def progress_of(self, job: Job, drawn: Drawn, routing: RoutingRows | None) -> Progress:
        """Add the next token to a job and see whether it ends."""
        if job.hidden_sum is not None:
            self.end(job, "stop")
            return Progress(job, None, "stop")
        if drawn.failure:
            job.failure = drawn.failure
            self.end(job, "failed")
            return Progress(job, None, "failed", routing=routing)
        if drawn.token in job.stop_ids:
            self.end(job, "stop")
            return Progress(job, None, "stop", routing=routing)
        job.ids.append(drawn.token)
        if job.history is not None:
            job.history.push(drawn.token)
        if job.constraint is not None:
            job.constraint.push(drawn.token)
        if len(job.ids) - job.prompt_tokens >= job.most_tokens:
            self.end(job, "length")
        return Progress(job, drawn.token, job.finish, drawn.logprob, drawn.top_logprobs, routing)

    def end(self, job: Job, why: FinishReason) -> None:
        job.finish = why
        if job in self.running:
            self.running.remove(job)
            self.give_up_pages(job)
        elif job in self.waiting:  # an interruption may have come between the two
            self.waiting.remove(job)


def rows_of(logits: Tensor, rows: list[int]) -> Tensor:
    """Some rows, in order; without a copy where they stand together."""
    return logits[rows[0]:rows[-1] + 1] if rows[-1] - rows[0] + 1 == len(rows) else logits[rows]


def reusable(job: Job) -> int:
    """How many tokens of the text may come from known pages: what still has to be shown or summed must be computed."""
    if job.hidden_sum is not None:
        return 0
    return job.routed + 1 if job.routing == "all" else len(job.ids)


def pages_for(positions: int) -> int:
    return -(-positions // PAGE)


def scheduler_for(model: LingForCausalLM) -> Scheduler | None:
    """A scheduler with room for one full context, on weights as exact as the model's own; None where the engine cannot run it."""
    weight = model.lm_head.weight
    if weight.is_cuda or weight.dtype not in (torch.float32, torch.bfloat16) or why_not(model.config) is not None:
        return None
    kind: Kind = "fp32" if weight.dtype == torch.float32 else "bf16"
    engine = Engine(source_of_model(model, kind), pages_for(model.config.max_position_embeddings) + 1)
    return Scheduler(engine, speculator=speculator_for(engine))


def stream_job(scheduler: Scheduler, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling, stop_ids: Collection[int],
               sequence: int = 0) -> Generator[int, None, None]:
    """The tokens of one answer as they come, alone on the scheduler; closing it cancels the job. Raises `UserError` as `submit` does."""
    job = scheduler.submit(prompt, max_new_tokens, sampling, stop_ids, sequence)
    try:
        while job.finish is None:
            for progress in scheduler.step():
                if progress.finish == "failed":
                    raise UserError(job.failure)
                if progress.token is not None:
                    yield progress.token
    finally:
        scheduler.cancel(job)
