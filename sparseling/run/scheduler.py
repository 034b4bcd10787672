"""Continuous batching: sequences come and go at every step, prompts are computed in chunks between the tokens of others.

What a sequence gets does not depend on its company: the engine computes every token in one order, and draws belong to sequences.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Sequence

import numpy as np
import torch

from ..errors import UserError
from ..model.transformer import LingForCausalLM
from .draw import Drawn, draw_tokens
from .engine import PAGE, Engine, StepOutput, why_not
from .job import Constraint, FinishReason, Job, Progress, RoutingOf, RoutingRows
from .packed import Kind
from .pages import PagePool, key_after
from .sampler import GREEDY, Sampling


class Scheduler:
    """Runs jobs on an engine. `prefill_tokens`: most prompt tokens in a step; `most_jobs` computed at once, the others wait in order.

    With `count_experts`, `expert_counts` [MoE layers, experts] says how often each expert was used since the start, by `tokens_read`.
    """

    def __init__(self, engine: Engine, prefill_tokens: int = 512, most_jobs: int = 64, count_experts: bool = False) -> None:
        self.engine, self.prefill_tokens, self.most_jobs, self.count_experts = engine, prefill_tokens, most_jobs, count_experts
        self.expert_counts = np.zeros((len(engine.expert_biases), engine.config.num_experts), dtype=np.int64)
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
        """Compute one batch: a token of every job that answers, and prompt tokens of those that do not yet."""
        self.admit()
        batch = self.choose()
        if not batch:
            return []
        out = self.compute(batch)
        routing = self.routing_of(batch, out)
        for job, count in batch:
            job.computed += count
            self.remember_pages(job)
        ready = [job for job, _ in batch if job.computed == len(job.ids)]
        drawn = draw_tokens(ready, out.logits)
        progress = [self.progress_of(job, new, routing.pop(job, None)) for job, new in zip(ready, drawn, strict=True)]
        return progress + [Progress(job, None, None, routing=rows) for job, rows in routing.items()]

    def admit(self) -> None:
        """Let waiting jobs in while there is room for their whole text so far."""
        while self.waiting and len(self.running) < self.most_jobs:
            job = self.waiting[0]
            found = self.pool.find(job.ids[:reusable(job)])
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
            if not job.pages:  # sent back
                continue
            left = len(job.ids) - job.computed
            count = left if left == 1 else min(left, budget)
            if count and self.make_room(job, job.computed + count):
                batch.append((job, count))
                budget -= count if left > 1 else 0
        return [(job, count) for job, count in batch if job.pages]

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
        shown = any(job.routing != "nothing" for job, _ in batch)
        return self.engine.step(torch.tensor(tokens), torch.tensor(positions), torch.tensor(sequences), torch.from_numpy(tables),
                                torch.tensor(wanted, dtype=torch.int64), any(job.hidden_sum is not None for job, _ in batch),
                                shown or self.count_experts, shown)

    def routing_of(self, batch: list[tuple[Job, int]], out: StepOutput) -> dict[Job, RoutingRows]:
        """Take from a step what is not logits: expert counts, sums of hidden states, and the routing of the jobs that show it."""
        rows: dict[Job, RoutingRows] = {}
        start = 0
        for job, count in batch:
            end = job.computed + count
            if job.hidden_sum is not None and out.hidden is not None:
                for hidden in out.hidden[start:start + count].numpy():  # one by one: the sum must not depend on how the prompt was cut
                    job.hidden_sum += hidden
            if job.routing != "nothing" and end > job.routed and out.expert_scores is not None:
                new = slice(start + max(0, job.routed - job.computed), start + count)
                rows[job] = RoutingRows(max(job.routed, job.computed), *(
                    np.ascontiguousarray(part.numpy()[:, new].swapaxes(0, 1))
                    for part in (out.expert_ids, out.expert_weights, out.expert_scores) if part is not None))
                job.routed = end
            start += count
        if self.count_experts and out.expert_ids is not None:
            experts = self.engine.config.num_experts
            for layer, ids in enumerate(out.expert_ids.numpy()):
                self.expert_counts[layer] += np.bincount(ids.ravel(), minlength=experts)
            self.tokens_read += start
        return rows

    def remember_pages(self, job: Job) -> None:
        """Make the pages that are full now known by their text."""
        for number in range(len(job.keys), job.computed // PAGE):
            before = job.keys[-1] if job.keys else b""
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
        else:
            self.waiting.remove(job)


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
    return Scheduler(Engine(model, kind, pages_for(model.config.max_position_embeddings) + 1))


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
