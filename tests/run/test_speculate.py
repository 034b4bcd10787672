"""Speculative decoding: the MTP layer computes what the model's does, and guesses never change what is said."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseling.config import preset
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.run.batch import Portion
from sparseling.run.engine import Engine, why_not
from sparseling.run.job import Job, Progress
from sparseling.run.packed import Kind
from sparseling.run.sampler import GREEDY, Sampling
from sparseling.run.scheduler import Scheduler
from sparseling.run.source import source_of_model
from sparseling.run.speculate import ENOUGH, PROBE_EVERY, SAMPLES, Speculator, Words

SMALL = preset("nano").replace(
    vocab_size=200, hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_experts=16, num_experts_per_tok=3, n_group=4,
    topk_group=2, max_position_embeddings=256, num_nextn_predict_layers=1, initializer_range=0.15,
)
WILD = Sampling(temperature=0.7, top_p=0.95, top_k=50, repetition_penalty=1.2, presence_penalty=0.5, logit_bias=((7, 3.0),), seed=3)

if (reason := why_not(SMALL)) is not None:
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def model() -> LingForCausalLM:
    model = initialize(LingForCausalLM(SMALL), 11).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    for router in model.routers():
        router.expert_bias += 0.1 * torch.randn(SMALL.num_experts, generator=generator)
    return model


def prompts_of(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(200) for _ in range(rng.choice([1, 3, 16, 17, 40, 90]))] for _ in range(count)]


class Oracle(Speculator):
    """Guesses from the known answers, a share of them wrong: what the MTP layer may do at its best and its worst."""

    def __init__(self, engine: Engine, answers: Sequence[list[int]], wrong: float, drafts: int) -> None:
        super().__init__(engine, drafts, always=True)
        self.texts, self.wrong, self.rng = [list(answer) for answer in answers], wrong, random.Random(5)

    def propose(self, parts: Sequence[Portion], hidden: Tensor, tables: Tensor) -> None:
        for part in parts:
            job = part.job
            if job.finish is None and job.pages and job.computed == len(job.ids) - 1 and self.room(job) > 0:
                text = next(text for text in self.texts if text[:len(job.ids)] == job.ids)
                guesses = text[len(job.ids):len(job.ids) + self.room(job)]
                job.drafts = [guess if self.rng.random() >= self.wrong else (guess + 1) % 200 for guess in guesses]


def told_of(entry: Progress) -> tuple[object, ...]:
    return entry.token, entry.finish, entry.logprob, entry.top_logprobs


def run(scheduler: Scheduler, prompts: list[list[int]], sampling: Sampling, stop: tuple[int, ...] = (), **options: object,
        ) -> tuple[list[Job], list[Progress], int]:
    jobs = [scheduler.submit(prompt, 30, sampling, stop, n, **options) for n, prompt in enumerate(prompts)]  # type: ignore[arg-type]
    progress, steps = [], 0
    while scheduler.busy:
        progress += scheduler.step()
        steps += 1
    return jobs, progress, steps


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[25], [1] * 25, [16, 8, 1]])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_mtp_layer_of_the_engine_is_the_models(model: LingForCausalLM, chunks: list[int], threads: int) -> None:
    ids = torch.randint(0, 200, (26,), generator=torch.Generator().manual_seed(2))
    expected = model(ids[None, :], with_mtp=True)
    engine = Engine(source_of_model(model, "fp32"), 4, threads)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    hidden, logits, start = [], [], 0
    for chunk in chunks:
        positions, sequences = torch.arange(start, start + chunk), torch.zeros(chunk, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        states = engine.step(ids[start:start + chunk], positions, sequences, table, none, hidden=True).hidden
        assert states is not None
        out = engine.look_ahead(states, ids[start + 1:start + chunk + 1], positions, sequences, table, torch.arange(chunk))
        assert out.hidden is not None
        hidden.append(out.hidden)
        logits.append(out.logits)
        start += chunk
    torch.testing.assert_close(torch.cat(hidden), expected.mtp_hidden_states[0][0, :25], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(torch.cat(logits), model.logits(expected.mtp_hidden_states[0])[0, :25], rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_guesses_are_the_likeliest_words_one_from_the_other(model: LingForCausalLM, kind: Kind) -> None:
    config = SMALL.replace(vocab_size=197)
    engine = Engine(source_of_model(initialize(LingForCausalLM(config), 4).eval(), kind), 9, 2)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(7, 64, generator=generator)
    ids, positions = torch.randint(0, 197, (7,), generator=generator), torch.tensor([0, 1, 2, 0, 1, 0, 1])
    sequences, tables = torch.tensor([0, 0, 0, 1, 1, 2, 2]), torch.tensor([[3], [1], [5]], dtype=torch.int32)
    wanted, rooms = torch.tensor([2, 4, 6]), torch.tensor([3, 1, 4])
    for blocks in (torch.arange(13), torch.tensor([0, 3, 4, 5, 12])):
        words = (16 * blocks[:, None] + torch.arange(16)).flatten()
        words = words[words < 197]
        guesses = engine.guess(states, ids, positions, sequences, tables, wanted, rooms, 4, blocks)
        for row, (last, room) in enumerate(zip(wanted.tolist(), rooms.tolist(), strict=True)):
            first = int((sequences == row).nonzero()[0])
            look = (states[first:last + 1], ids[first:last + 1], positions[first:last + 1])
            for depth in range(room):
                count = len(look[1])
                out = engine.look_ahead(*look, torch.zeros(count, dtype=torch.int64), tables[row:row + 1], torch.tensor([count - 1]))
                best = words[out.logits[0, words].argmax()]
                assert int(guesses[row, depth]) == int(best)
                assert out.hidden is not None
                look = (out.hidden[-1:], best[None], look[2][-1:] + 1)


def test_guesses_outside_of_the_cache_are_refused(model: LingForCausalLM) -> None:
    engine = Engine(source_of_model(model, "fp32"), 2, 1)
    states, one = torch.zeros(1, 64), torch.tensor([0])
    table = torch.tensor([[0, -1]], dtype=torch.int32)
    for position, room, drafts, blocks in (
        (14, 3, 3, [0]), (30, 3, 3, [0]), (0, 3, 2, [0]), (0, 0, 2, [0]), (0, 1, 1, [13]), (0, 1, 1, [-1]),
        (0, 1, 1, []), (0, 1, 1, [3, 3]), (0, 1, 1, [4, 3]),
    ):
        with pytest.raises(ValueError, match="guess"):
            engine.guess(states, one, torch.tensor([position]), one, table, one, torch.tensor([room]), drafts,
                         torch.tensor(blocks, dtype=torch.int64))


def test_words_that_are_not_said_are_left_out_until_they_are() -> None:
    words = Words(1000)
    assert words.blocks.tolist() == list(range(63))
    words.learn([3, 999] * 300)
    assert words.blocks.tolist() == [0, 62]
    words.learn([500] * 2000)
    words.learn([500] * 2000)
    assert 31 in words.blocks.tolist() and len(words.blocks) <= 3


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("sampling", [GREEDY, WILD], ids=["greedy", "wild"])
def test_guesses_of_the_model_change_no_token(model: LingForCausalLM, sampling: Sampling, drafts: int) -> None:
    prompts = prompts_of(10)
    plain, _, _ = run(Scheduler(Engine(source_of_model(model, "fp32"), 200, 2)), prompts, sampling)
    stop = (plain[0].answer[11],)
    for pages, options in ((200, {}), (14, {"prefill_tokens": 20, "most_jobs": 5}), (40, {"most_jobs": 1})):
        engine = Engine(source_of_model(model, "fp32"), pages, 2)
        scheduler = Scheduler(engine, speculator=Speculator(engine, drafts, always=True), **options)
        assert [job.answer for job in run(scheduler, prompts, sampling)[0]] == [job.answer for job in plain]
        assert scheduler.pool.available == pages
        assert scheduler.speculator is not None and scheduler.speculator.proposed.all()
        stopped, _, _ = run(scheduler, prompts, sampling, stop)
        for job, whole in zip(stopped, plain, strict=True):
            ends = [n for n, token in enumerate(whole.answer) if token in stop]
            assert job.answer == whole.answer[:ends[0] if ends else None]


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("drafts", [1, 4])
def test_right_and_wrong_guesses_change_nothing_that_is_reported(model: LingForCausalLM, wrong: float, drafts: int) -> None:
    prompts = prompts_of(6)
    plain_scheduler = Scheduler(Engine(source_of_model(model, "fp32"), 200, 2), count_experts=True)
    plain, told, steps = run(plain_scheduler, prompts, WILD, top_logprobs=3, routing="answer")
    engine = Engine(source_of_model(model, "fp32"), 200, 2)
    scheduler = Scheduler(engine, count_experts=True, speculator=Oracle(engine, [job.ids for job in plain], wrong, drafts))
    guessed, told_now, steps_now = run(scheduler, prompts, WILD, top_logprobs=3, routing="answer")
    for number, job in enumerate(guessed):
        before, after = ([entry for entry in entries if entry.job is this] for entries, this in ((told, plain[number]), (told_now, job)))
        assert list(map(told_of, before)) == list(map(told_of, after))
        for field in ("expert_ids", "weights", "scores"):
            rows = [np.concatenate([getattr(e.routing, field) for e in entries if e.routing is not None]) for entries in (before, after)]
            assert np.array_equal(*rows)
        assert next(e.routing.first for e in after if e.routing is not None) == job.prompt_tokens
    assert np.array_equal(plain_scheduler.expert_counts, scheduler.expert_counts)
    assert plain_scheduler.tokens_read == scheduler.tokens_read
    assert scheduler.speculator is not None and scheduler.pool.available == 200
    if wrong == 0:
        assert scheduler.speculator.acceptance == 1 and steps_now <= 3 + 29 / (drafts + 1)
    elif wrong == 1:
        assert scheduler.speculator.acceptance == 0 and steps_now == steps


def test_guessing_ends_where_it_does_not_pay_and_stays_where_it_does(model: LingForCausalLM) -> None:
    engine = Engine(source_of_model(model, "fp32"), 20, 1)
    job = Scheduler(engine).submit([1, 2], 30)
    for seconds, verdict in ((0.5, True), (1.1, False)):
        speculator = Speculator(engine, 1)
        job.speculates = True
        for _ in range(ENOUGH):
            speculator.learn([Portion(job, 2, 1, accepted=1)], 2, 0.0, 2 * seconds)
            speculator.learn([Portion(job, 1)], 1, 1.0, 1.4)
        assert job.speculates is verdict and speculator.accepts(1) is verdict
        assert sum(speculator.accepts(1) for _ in range(100)) == (100 if verdict else 3)
        assert speculator.accepts(8)  # nothing is known of so many
        assert [speculator.guesses_now(1) for _ in range(PROBE_EVERY)].count(False) == 1
        for _ in range(SAMPLES):
            speculator.learn([Portion(job, 90)], 1, 100.0, 100.0)  # a prompt tells nothing
        assert speculator.accepts(1) is verdict or speculator.cost(1).gain == pytest.approx(1 / seconds)


def test_pages_without_keys_of_the_mtp_layer_are_not_taken_by_jobs_that_guess(model: LingForCausalLM) -> None:
    prompt = prompts_of(1)[0][:1] * 3 + [5, 9] * 40
    engine = Engine(source_of_model(model, "fp32"), 60, 1)
    alone = Scheduler(engine, speculator=Speculator(engine, 2, always=True))
    run(alone, [prompt], GREEDY)
    scheduler = Scheduler(engine, speculator=Speculator(engine, 2, always=True))
    scheduler.submit_embedding(prompt)
    while scheduler.busy:
        scheduler.step()
    [first], _, _ = run(scheduler, [prompt], GREEDY)
    assert first.cached_tokens == 0, "the embedding left pages that nobody guesses from"
    assert alone.speculator is not None and scheduler.speculator is not None
    assert scheduler.speculator.accepted.tolist() == alone.speculator.accepted.tolist()
    [again], _, _ = run(scheduler, [prompt], GREEDY)
    assert again.cached_tokens >= 64 and again.answer == first.answer
