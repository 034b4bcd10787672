"""Continuous batching: what a sequence gets never depends on what else is computed, cached, sent back or cancelled."""

from __future__ import annotations

import random

import pytest

from sparseling.config import preset
from sparseling.errors import UserError
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.run.engine import Engine, why_not
from sparseling.run.generate import generate
from sparseling.run.sampler import GREEDY, Sampling
from sparseling.run.scheduler import Job, Scheduler
from sparseling.run.source import source_of_model

SMALL = preset("nano").replace(
    vocab_size=200, hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_experts=16, num_experts_per_tok=3, n_group=4,
    topk_group=2, max_position_embeddings=256, num_nextn_predict_layers=0, initializer_range=0.15,
)
WILD = Sampling(temperature=1.5, top_p=0.95, top_k=50, repetition_penalty=1.2, seed=3)

if (reason := why_not(SMALL)) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def model() -> LingForCausalLM:
    return initialize(LingForCausalLM(SMALL), 11).eval()


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(200) for _ in range(rng.choice([1, 3, 16, 17, 40, 90]))] for _ in range(count)]


def finish(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.step()


def answers(model: LingForCausalLM, prompts: list[list[int]], sampling: Sampling, pages: int = 400, stop: tuple[int, ...] = (),
            **options: int) -> list[list[int]]:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), pages, 1), **options)
    jobs = [scheduler.submit(prompt, 30, sampling, stop, n) for n, prompt in enumerate(prompts)]
    finish(scheduler)
    assert scheduler.pool.available == pages
    return [job.answer for job in jobs]


@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "wild"])
def test_answers_are_those_of_the_plain_generation(model: LingForCausalLM, sampling: Sampling) -> None:
    prompts = prompts_of(12)
    assert answers(model, prompts, sampling) == generate(model, prompts, 30, sampling)


@pytest.mark.parametrize("options", [
    {"prefill_tokens": 7}, {"most_jobs": 1}, {"pages": 14}, {"pages": 14, "prefill_tokens": 20, "most_jobs": 5},
])
def test_limits_change_the_order_and_nothing_else(model: LingForCausalLM, options: dict[str, int]) -> None:
    prompts = prompts_of(15, seed=2)
    assert answers(model, prompts, WILD, **options) == answers(model, prompts, WILD)


def test_a_stop_token_ends_an_answer_and_does_not_stand_in_it(model: LingForCausalLM) -> None:
    prompts = prompts_of(6)
    plain = answers(model, prompts, GREEDY)
    stop = plain[0][4]
    got = answers(model, prompts, GREEDY, stop=(stop,))
    assert got == [answer[:answer.index(stop)] if stop in answer else answer for answer in plain]


def test_a_known_beginning_is_not_computed_again_and_changes_no_token(model: LingForCausalLM) -> None:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 100, 1))
    shared = prompts_of(1, seed=5)[0] * 3 + list(range(60))
    first = scheduler.submit([*shared, 1], 20)
    finish(scheduler)
    jobs = [scheduler.submit(prompt, 20) for prompt in ([*shared, 1], [*shared, 2], first.ids + [3])]
    finish(scheduler)
    assert first.cached_tokens == 0 and jobs[0].cached_tokens == len(shared) // 16 * 16
    assert jobs[1].cached_tokens == len(shared) // 16 * 16 and jobs[2].cached_tokens == (len(first.ids) - 1) // 16 * 16
    for job in jobs:
        assert job.answer == generate(model, [job.ids[:job.prompt_tokens]], 20)[0]


def test_jobs_that_come_and_are_cancelled_at_any_time_disturb_nobody(model: LingForCausalLM) -> None:
    rng, prompts = random.Random(9), prompts_of(25, seed=4)
    want = generate(model, prompts, 30, WILD)
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 40, 1), prefill_tokens=33)
    jobs: list[Job] = []
    cancelled = set()
    while len(jobs) < len(prompts) or scheduler.busy:
        if len(jobs) < len(prompts) and rng.random() < 0.4:
            jobs.append(scheduler.submit(prompts[len(jobs)], 30, WILD, sequence=len(jobs)))
        if jobs and rng.random() < 0.05:
            job = rng.choice(jobs)
            if job.finish is None:
                cancelled.add(id(job))
            scheduler.cancel(job)
        scheduler.step()
    assert scheduler.pool.available == 40 and cancelled
    for job, answer in zip(jobs, want, strict=True):
        if id(job) in cancelled:
            assert job.finish == "cancelled" and job.answer == answer[:len(job.answer)]
        else:
            assert job.finish == "length" and job.answer == answer


def test_an_answer_ends_where_the_context_does(model: LingForCausalLM) -> None:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 3, 1))
    job = scheduler.submit(list(range(40)), 30)
    finish(scheduler)
    assert len(job.ids) == 48 and job.finish == "length"


@pytest.mark.parametrize(("prompt", "says"), [
    ([], "has no tokens"), ([200], "outside 0 to 199"), ([-1], "outside 0 to 199"), ([1] * 64, "a context of 64"),
])
def test_prompts_that_cannot_be_computed_are_refused(model: LingForCausalLM, prompt: list[int], says: str) -> None:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 4, 1))
    with pytest.raises(UserError, match=says):
        scheduler.submit(prompt, 5)
    assert not scheduler.busy


def test_steps_report_every_token_once_and_the_end(model: LingForCausalLM) -> None:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 50, 1))
    jobs = [scheduler.submit(prompt, 12) for prompt in prompts_of(5)]
    seen: dict[int, list[int]] = {id(job): [] for job in jobs}
    ends = []
    while scheduler.busy:
        for progress in scheduler.step():
            if progress.token is not None:
                seen[id(progress.job)].append(progress.token)
            if progress.finish:
                ends.append(id(progress.job))
    assert seen == {id(job): job.answer for job in jobs} and sorted(ends) == sorted(seen)
    assert scheduler.step() == []
