"""Sampling against its definition written out in NumPy, and against the chi-square law."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseling.errors import UserError
from sparseling.run import sampler
from sparseling.run.sampler import GREEDY, Sampling, next_tokens, uniform_draws


def distribution(logits: np.ndarray, history: list[int], sampling: Sampling) -> np.ndarray:
    """The probabilities of one row, token by token, in float64 and with plain loops."""
    scores = logits.astype(np.float64)
    for token in set(history):
        scores[token] = scores[token] / sampling.repetition_penalty if scores[token] > 0 else scores[token] * sampling.repetition_penalty
    scores /= sampling.temperature
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if sampling.top_k:
        order = order[:sampling.top_k]
    weights = [math.exp(scores[token] - scores[order[0]]) for token in order]
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if sampling.top_p == 1 or mass < sampling.top_p * sum(weights):
            kept.append(token)
        mass += weight
    kept = [token for token in kept if weights[order.index(token)] >= sampling.min_p]
    probabilities = np.zeros(len(scores))
    for token, weight in zip(order, weights, strict=True):
        probabilities[token] = weight if token in kept else 0.0
    return probabilities / probabilities.sum()


@pytest.fixture(params=["kernel", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Drawn by the C++ kernel, and as on a GPU."""
    if request.param == "kernel" and not sampler.can_draw():
        pytest.skip("the C++ kernels are not there")
    if request.param == "torch":
        monkeypatch.setattr(sampler, "can_draw", lambda: False)
    return str(request.param)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 10**6), st.sampled_from([1, 2, 7, 40]), st.sampled_from([0.3, 1.0, 1.7]), st.sampled_from([0, 1, 3, 40, 99]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0]), st.sampled_from([1.0, 1.3, 0.8]), st.booleans(), st.sampled_from([0.0, 0.1, 0.6, 1.0]),
)
def test_the_token_drawn_is_where_the_draw_falls_in_the_brute_force_distribution(
    path: str, seed: int, vocab: int, temperature: float, top_k: int, top_p: float, penalty: float, ties: bool,
    min_p: float,
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal((5, vocab)) * 3).astype(np.float32)
    if ties:
        logits = np.round(logits)                                # many equal logits: ranks go by id
    history = random.integers(0, vocab, (5, 4))
    sampling = Sampling(temperature, top_p, top_k, penalty, min_p=min_p)
    draws = random.random(5)
    tokens = next_tokens(torch.from_numpy(logits), torch.from_numpy(history), sampling, torch.from_numpy(draws))
    for row in range(5):
        token = int(tokens[row])
        upper = np.cumsum(distribution(logits[row], history[row].tolist(), sampling))
        lower = 0.0 if token == 0 else upper[token - 1]
        assert lower - 1e-6 <= draws[row] <= upper[token] + 1e-6
        assert upper[token] > lower, "a token of probability 0"


@pytest.mark.parametrize("sampling", [
    Sampling(1.0, 1.0, 0, 1.0), Sampling(0.7, 0.8, 0, 1.05), Sampling(1.3, 1.0, 12, 1.0), Sampling(1.0, 0.9, 20, 1.2),
])  # fmt: skip
def test_frequencies_follow_the_distribution(path: str, sampling: Sampling) -> None:
    random = np.random.default_rng(7)
    logits, history, n = random.standard_normal(50).astype(np.float32) * 2, [3, 4, 3], 20_000
    expected = distribution(logits, history, sampling) * n
    draws = uniform_draws(11, [0], n)[0]
    tokens = next_tokens(torch.from_numpy(logits).expand(n, -1), torch.tensor(history).expand(n, -1), sampling, draws)
    seen = np.bincount(tokens.numpy(), minlength=50)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    chi_square, freedom = ((seen - expected)[possible] ** 2 / expected[possible]).sum(), possible.sum() - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)  # 4 standard deviations of the chi-square law, both ways


def test_draws_are_uniform_independent_and_do_not_depend_on_length_or_neighbours() -> None:
    many = uniform_draws(3, range(2000), 50)
    assert torch.equal(many[17:18, :9], uniform_draws(3, [17], 9))
    assert not torch.equal(many[17:18], uniform_draws(4, [17], 50)) and not torch.equal(many[17], many[18])
    assert many.min() >= 0 and many.max() < 1
    counts = np.bincount((many.flatten().numpy() * 100).astype(int), minlength=100)
    assert abs(((counts - 1000) ** 2 / 1000).sum() - 99) < 4 * math.sqrt(198)
    correlation = np.corrcoef(many[:, 0], many[:, 1])[0, 1], np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]
    assert np.abs(correlation).max() < 0.1                       # between steps, and between neighbouring sequences


def test_a_row_is_sampled_as_if_it_were_alone(path: str) -> None:
    torch.manual_seed(0)
    logits, history = torch.randn(16, 300) * 2, torch.randint(0, 300, (16, 5))
    draws, sampling = uniform_draws(0, range(16), 1)[:, 0], Sampling(0.9, 0.7, 0, 1.1)
    together = next_tokens(logits, history, sampling, draws)
    alone = [next_tokens(logits[r:r + 1], history[r:r + 1], sampling, draws[r:r + 1]) for r in range(16)]
    assert torch.equal(together, torch.cat(alone))


def test_greedy_takes_the_first_of_the_best_after_the_penalty() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -1.0], [-2.0, -3.0, -2.5, -9.0]])
    assert next_tokens(logits, None, GREEDY, None).tolist() == [1, 0]
    penalised = dataclasses.replace(GREEDY, repetition_penalty=2.0)
    assert next_tokens(logits, torch.tensor([[1, 1], [0, 3]]), penalised, None).tolist() == [2, 2]
    assert torch.equal(logits[0], torch.tensor([1.0, 3.0, 3.0, -1.0])), "the logits of the caller are not touched"


def test_the_extremes_of_the_draw_never_give_an_impossible_token(path: str) -> None:
    logits = torch.tensor([[-math.inf, 5.0, 4.0, -math.inf, -200.0]]).repeat(2, 1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for sampling in (Sampling(1.0, 1.0, 0, 1.0), Sampling(1.0, 0.999, 0, 1.3), Sampling(1.0, 1.0, 4, 1.0)):
        assert next_tokens(logits, torch.tensor([[0, 1], [0, 1]]), sampling, draws).tolist() == [1, 2]


def test_extreme_temperatures_and_a_vocabulary_of_published_size(path: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 157184) * 5
    draws = torch.tensor([0.3, 0.999], dtype=torch.float64)
    assert torch.equal(next_tokens(logits, None, Sampling(1e-300), draws), logits.argmax(-1))
    assert torch.equal(next_tokens(logits, None, Sampling(1e-4, 1.0), draws), logits.argmax(-1))
    hot = next_tokens(logits, None, Sampling(1e30, 1.0), draws)
    assert hot.tolist() == [int(157184 * 0.3), int(157184 * 0.999)]  # so hot that all tokens are alike
    probabilities = torch.softmax(logits[0].double(), -1)
    order = probabilities.argsort(descending=True)
    nucleus = order[: int((probabilities[order].cumsum(0) < 0.5).sum()) + 1]
    assert all(int(next_tokens(logits[:1], None, Sampling(1.0, 0.5), draws[None, n % 2])) in nucleus for n in range(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_the_models_fault(bad: float) -> None:
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(UserError, match="logits are not finite"):
            next_tokens(torch.tensor([[0.0, bad, 1.0]]), None, sampling, torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize(("key", "value"), [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", "hot"), ("top_p", 0.0), ("top_p", 1.01), ("top_k", -1),
    ("top_k", 2.5), ("top_k", True), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("seed", -1), ("seed", 1.5),
    ("min_p", -0.1), ("min_p", 1.1), ("presence_penalty", 2.1), ("frequency_penalty", -3.0), ("frequency_penalty", True),
    ("logit_bias", ((-1, 1.0),)),
    ("logit_bias", ((1, 101.0),)), ("logit_bias", ((1, math.nan),)), ("logit_bias", ((True, 1.0),)), ("logit_bias", ((1, "x"),)),
])  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{key}: "):
        Sampling(**{key: value})
