"""From router logits to experts and weights, and sorting pairs by expert."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseling.kernels.route import route, sort_by_expert

from .comparing import LAYOUTS, assert_equals_formula, few, threads
from .operations import ROUTE, best_experts, generator, route_inputs


@few(40)
@given(tokens=st.integers(0, 60), groups=st.integers(1, 6), size=st.integers(2, 20), data=st.data(), cores=st.integers(1, 3),
       layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_weights_and_log_norm_equal_the_formula_with_gradients(
    fast_path: str, tokens: int, groups: int, size: int, data: st.DataObject, cores: int, layout: str, seed: int
) -> None:
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, min(9, kept * size)))
    assert_equals_formula(ROUTE, route_inputs(tokens, groups, size, kept, k, seed), layout, layout, cores)


@few(40)
@given(tokens=st.integers(0, 60), groups=st.integers(1, 6), size=st.integers(2, 9), data=st.data(), cores=st.integers(1, 3),
       seed=st.integers(0, 99))
def test_chosen_experts_equal_brute_force(path: str, tokens: int, groups: int, size: int, data: st.DataObject, cores: int,
                                          seed: int) -> None:
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * size))
    inputs = route_inputs(tokens, groups, size, kept, k, seed)
    with threads(cores):
        ids = route(*inputs)[0].tolist()
    biased = (torch.sigmoid(inputs[0].double()) + inputs[1].double()).tolist()
    assert ids == [best_experts(scores, groups, kept, k) for scores in biased]


@pytest.mark.parametrize("groups", [1, 4])
def test_of_equal_scores_the_first_experts_win(variant: str, groups: int) -> None:
    ids, weights, log_norm = route(torch.zeros(2, 16), torch.zeros(16), groups, min(groups, 2), 5, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    torch.testing.assert_close((weights, log_norm), (torch.full((2, 5), 0.2), torch.full((2,), math.log(16))))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_broken_logits_still_choose_different_experts_in_range(variant: str, value: float, groups: int) -> None:
    logits = torch.full((3, 16), value)
    logits[1, 3:9] = 1.0
    for ids in route(logits, torch.zeros(16), groups, min(groups, 2), 6, 1.0)[0].tolist():
        assert len(set(ids)) == 6 and all(0 <= e < 16 for e in ids)


@pytest.mark.parametrize("experts", [5, 16, 37])
def test_a_broken_logit_breaks_the_log_norm_of_its_token_alone(path: str, experts: int) -> None:
    logits = torch.randn(9, experts, generator=generator(0))
    logits[4, experts - 1] = logits[5, 0] = float("nan")
    log_norm = route(logits, torch.zeros(experts), 1, 1, 2, 1.0)[2]
    assert log_norm.isnan().nonzero().flatten().tolist() == [4, 5]


def test_extreme_logits_neither_overflow_nor_lose_their_gradient(path: str) -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0], [-20.0, -21.0, -22.0]]).requires_grad_()
    _, weights, log_norm = route(logits, torch.zeros(3), 1, 1, 2, 1.0)
    torch.testing.assert_close(log_norm, torch.tensor([500.0, -20.0 + math.log(1 + math.exp(-1) + math.exp(-2))]))
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    (grad,) = torch.autograd.grad(log_norm.sum(), logits)
    torch.testing.assert_close(grad, torch.softmax(logits.detach(), 1), atol=1e-6, rtol=1e-5)


def test_large_logits_keep_the_gradient_of_their_weights(path: str) -> None:
    logits = torch.linspace(-9, 9, 40).repeat(3, 1)[:, torch.randperm(40, generator=generator(0))]
    assert_equals_formula(ROUTE, (logits, torch.linspace(-1, 1, 40), 2, 1, 6, 2.5))


@pytest.mark.parametrize("used", ["weights", "log norm", "neither"])
def test_an_unused_result_needs_no_gradient(path: str, used: str) -> None:
    logits, *rest = route_inputs(6, 1, 20, 1, 3)
    logits.requires_grad_()
    _, weights, log_norm = route(logits, *rest)
    scale = torch.zeros(()).requires_grad_()
    loss = scale + {"weights": weights.square().sum(), "log norm": log_norm.sum(), "neither": 0.0}[used]
    loss.backward()
    assert scale.grad == 1 and (logits.grad is None if used == "neither" else bool(logits.grad.abs().sum() > 0))


@few(30)
@given(tokens=st.integers(0, 60), k=st.integers(1, 4), experts=st.integers(1, 20), seed=st.integers(0, 99))
def test_pairs_are_sorted_stably_by_expert(variant: str, tokens: int, k: int, experts: int, seed: int) -> None:
    ids = torch.randint(0, experts, (tokens, k), generator=generator(seed))
    order, ends = sort_by_expert(ids, experts)
    assert order.tolist() == ids.flatten().argsort(stable=True).tolist()
    assert ends.tolist() == ids.flatten().bincount(minlength=experts).cumsum(0).tolist()


def test_ids_of_any_integer_type_are_sorted(variant: str) -> None:
    ids = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    assert sort_by_expert(ids, 3)[0].tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_an_id_out_of_range_is_named(variant: str, bad: int) -> None:
    with pytest.raises(IndexError, match=f"expert id {bad} is outside the 5 experts"):
        sort_by_expert(torch.tensor([[0, 4], [bad, 1]]), 5)


@pytest.mark.parametrize(("experts", "groups", "kept", "k", "biases"), [(8, 4, 1, 4, 8), (9, 2, 1, 1, 9), (8, 2, 3, 1, 8), (8, 2, 1, 1, 7)])
def test_misfitting_shapes_are_refused(variant: str, experts: int, groups: int, kept: int, k: int, biases: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        route(torch.zeros(1, experts), torch.zeros(biases), groups, kept, k, 1.0)
