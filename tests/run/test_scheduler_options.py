"""What jobs may ask for beside tokens: all of it exact, and the same alone as in company."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from sparseling.errors import UserError
from sparseling.model.mlp import MoE
from sparseling.model.router import Routing
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.run.engine import Engine, why_not
from sparseling.run.sampler import GREEDY, Sampling
from sparseling.run.scheduler import Job, Progress, Scheduler
from sparseling.run.source import source_of_model

from .test_scheduler import SMALL, WILD, prompts_of

if (reason := why_not(SMALL)) is not None:
    pytest.skip(reason, allow_module_level=True)


class Even:
    """Only even tokens, and 7 (a stop token) after the fifth."""

    def __init__(self) -> None:
        self.said = 0

    def allowed(self) -> np.ndarray:
        mask = np.arange(200) % 2 == 0
        mask[7] = self.said >= 5
        return mask

    def push(self, token: int) -> None:
        assert token % 2 == 0
        self.said += 1


class Nothing(Even):
    """No way on after two tokens."""

    def allowed(self) -> np.ndarray:
        return np.full(200, self.said < 2)

    def push(self, token: int) -> None:
        self.said += 1


@pytest.fixture(scope="module")
def model() -> LingForCausalLM:
    return initialize(LingForCausalLM(SMALL), 11).eval()


def all_kinds(scheduler: Scheduler, number: int, prompt: list[int]) -> Job:
    """One job of each kind, by number."""
    bias = ((3, 5.0), (9, -100.0))
    kinds = [
        {}, {"sampling": WILD}, {"sampling": dataclasses.replace(WILD, min_p=0.05, presence_penalty=1.0, frequency_penalty=0.5)},
        {"sampling": dataclasses.replace(GREEDY, logit_bias=bias), "top_logprobs": 3}, {"sampling": WILD, "top_logprobs": 0},
        {"routing": "answer"}, {"routing": "all", "sampling": WILD}, {"constraint": Even(), "sampling": WILD, "stop_ids": (7,)},
        {"sampling": Sampling(temperature=1.0, top_p=1.0, min_p=0.2, repetition_penalty=1.0)}, {"constraint": Nothing()},
    ]
    return scheduler.submit(prompt, 25, **{"sequence": number, "sampling": GREEDY, **kinds[number % len(kinds)]})  # type: ignore[arg-type]


def told(scheduler: Scheduler, jobs: list[Job]) -> list[list[object]]:
    """Everything that each job was told, routing joined by position."""
    texts: dict[Job, list[object]] = {job: [] for job in jobs}
    while scheduler.busy:
        for progress in scheduler.step():
            texts[progress.job].append((progress.token, progress.finish, progress.logprob, progress.top_logprobs))
            if progress.routing is not None:
                rows = progress.routing
                texts[progress.job] += [(rows.first + n, rows.expert_ids[n].tolist(), rows.weights[n].tolist(), rows.scores[n].tolist())
                                        for n in range(len(rows.expert_ids))]
    return [[item for item in text if item != (None, None, None, ())] for text in texts.values()]


@pytest.mark.parametrize(("pages", "options"), [(400, {}), (16, {"prefill_tokens": 20, "most_jobs": 7}), (400, {"prefill_tokens": 9})])
def test_a_job_is_told_the_same_alone_and_in_company(model: LingForCausalLM, pages: int, options: dict[str, int]) -> None:
    prompts = prompts_of(30, seed=6)
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), pages, 1), **options)
    together = told(scheduler, [all_kinds(scheduler, n, prompt) for n, prompt in enumerate(prompts)])
    for number, prompt in enumerate(prompts):
        alone = Scheduler(Engine(source_of_model(model, "fp32"), 40, 1))
        assert sorted(map(repr, told(alone, [all_kinds(alone, number, prompt)])[0])) == sorted(map(repr, together[number]))


def progress_of(scheduler: Scheduler) -> list[Progress]:
    return [progress for _ in iter(lambda: scheduler.busy, False) for progress in scheduler.step()]


@pytest.mark.parametrize("routing", ["answer", "all"])
def test_routing_is_the_models_for_every_token_read_once(model: LingForCausalLM, routing: str) -> None:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 60, 1), prefill_tokens=11, count_experts=True)
    prompt = prompts_of(1, seed=3)[0] + list(range(50))
    first = scheduler.submit(prompt, 4)
    progress_of(scheduler)
    job = scheduler.submit(prompt, 20, WILD, routing=routing)  # type: ignore[arg-type]
    rows = [progress.routing for progress in progress_of(scheduler) if progress.routing is not None]
    seen = [rows_.first + n for rows_ in rows for n in range(len(rows_.expert_ids))]
    assert seen == list(range(len(prompt) if routing == "answer" else 0, len(job.ids) - 1))
    assert job.cached_tokens == (0 if routing == "all" else (len(prompt) - 1) // 16 * 16)
    want: list[Routing] = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda _module, _inputs, out: want.append(out))
             for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    with torch.no_grad():
        model(torch.tensor([job.ids[:-1]]))
    for hook in hooks:
        hook.remove()
    for layer, exact in enumerate(want):
        ids, weights, scores = (np.concatenate([getattr(part, name)[:, layer] for part in rows])
                                for name in ("expert_ids", "weights", "scores"))
        assert (np.sort(ids) == np.sort(exact.expert_ids[seen].numpy())).mean() > 0.97   # all but ties that rounding decides
        np.testing.assert_allclose(scores, exact.logits[seen].sigmoid(), atol=2e-3)
        np.testing.assert_allclose(np.sort(weights).sum(1), exact.weights[seen].sum(1).numpy(), rtol=2e-3)
    read = len(first.ids) - 1 + len(job.ids) - 1 - job.cached_tokens
    assert scheduler.tokens_read == read and (scheduler.expert_counts.sum(1) == read * SMALL.num_experts_per_tok).all()


def test_log_probabilities_are_those_of_the_logits_before_any_change(model: LingForCausalLM) -> None:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 60, 1))
    sampling = dataclasses.replace(WILD, logit_bias=((5, 50.0),), presence_penalty=2.0)
    job = scheduler.submit([1, 2, 3], 12, sampling, top_logprobs=4)
    said = [(progress.logprob, progress.top_logprobs) for progress in progress_of(scheduler)]
    with torch.no_grad():
        exact = model.logits(model(torch.tensor([job.ids[:-1]])).hidden_states)[0].double().log_softmax(-1)[2:]
    for row, token, (logprob, best) in zip(exact, job.answer, said, strict=True):
        assert logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [value for _, value in best] == pytest.approx(row.topk(4).values.tolist(), abs=1e-3)
        assert best[0][0] == int(row.argmax())


def test_an_embedding_is_the_sum_of_hidden_states_whatever_the_cuts_and_the_company(model: LingForCausalLM) -> None:
    prompt = list(range(100))
    with torch.no_grad():
        want = model(torch.tensor([prompt])).hidden_states[0].double().sum(0).numpy()
    sums = []
    for budget in (512, 7):
        scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 40, 1), prefill_tokens=budget)
        others = [scheduler.submit(text, 9, WILD, sequence=n) for n, text in enumerate([prompt, *prompts_of(3)])] if budget == 7 else []
        scheduler.step()
        job = scheduler.submit_embedding(prompt)
        ends = [progress for progress in progress_of(scheduler) if progress.job is job]
        assert [(end.token, end.finish) for end in ends] == [(None, "stop")] and all(other.finish == "length" for other in others)
        assert job.hidden_sum is not None
        sums.append(job.hidden_sum)
    assert (sums[0] == sums[1]).all()
    np.testing.assert_allclose(sums[0], want, rtol=1e-3, atol=1e-2)


def test_a_job_that_cannot_go_on_fails_alone(model: LingForCausalLM) -> None:
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 40, 1))
    fine, stuck = scheduler.submit([1, 2], 10), scheduler.submit([1, 2], 10, constraint=Nothing())
    progress_of(scheduler)
    assert stuck.finish == "failed" and "no token can continue" in stuck.failure and len(stuck.answer) == 2
    assert fine.finish == "length" and scheduler.pool.available == 40
    with pytest.raises(UserError, match=r"^logit_bias: "):
        scheduler.submit([1], 5, dataclasses.replace(GREEDY, logit_bias=((200, 1.0),)))


def test_cancelled_at_random_with_all_kinds_of_jobs_no_page_is_lost(model: LingForCausalLM) -> None:
    rng = random.Random(4)
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 20, 1), prefill_tokens=30)
    jobs = [all_kinds(scheduler, n, prompt) for n, prompt in enumerate(prompts_of(20, seed=8))]
    while scheduler.busy:
        scheduler.step()
        scheduler.cancel(rng.choice(jobs))
    assert scheduler.pool.available == 20 and all(job.finish for job in jobs)


def test_an_embedding_that_was_sent_back_is_what_it_is_alone(model: LingForCausalLM) -> None:
    text = [7, 3, 11, 2] * 30
    alone = Scheduler(Engine(source_of_model(model, "fp32"), 40, 1))
    expected = alone.submit_embedding(text)
    while alone.busy:
        alone.step()
    scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 14, 1), prefill_tokens=6)
    for number in range(3):
        scheduler.submit([number + 1] * 20, 60, sequence=number)
    job, sent_back = scheduler.submit_embedding(text), 0
    while scheduler.busy:
        before = job.computed
        scheduler.step()
        sent_back += job.computed < before and job.finish is None
    assert sent_back and job.hidden_sum is not None and expected.hidden_sum is not None
    assert (job.hidden_sum == expected.hidden_sum).all()
