"""Routed experts and the dense SwiGLU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .comparing import LAYOUTS, assert_equals_formula, assert_within_bf16, few, results
from .operations import EXPERTS, SWIGLU, Inputs, experts_inputs, swiglu_inputs

ROUTINGS = ["random", "one takes all"]
OUT_OF_RANGE = [7, -1, 2**31, 2**62, -(2**63)]


@few(25)
@given(tokens=st.integers(1, 80), k=st.integers(1, 4), others=st.integers(0, 12), hidden=st.integers(3, 70), width=st.integers(3, 70),
       routing=st.sampled_from(ROUTINGS), cores=st.integers(1, 3), layout=st.sampled_from(sorted(LAYOUTS)),
       grad_layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_output_and_gradients_equal_the_formula(path: str, tokens: int, k: int, others: int, hidden: int, width: int, routing: str,
                                                cores: int, layout: str, grad_layout: str, seed: int) -> None:
    assert_equals_formula(EXPERTS, experts_inputs(tokens, k, k + others, hidden, width, routing, seed), layout, grad_layout, cores)


@pytest.mark.parametrize(("tokens", "k", "experts", "cores"), [(257, 1, 1, 1), (600, 2, 3, 2), (1100, 1, 4, 3), (2300, 2, 2, 2)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_more_tokens_than_a_block_equal_the_formula(fast_path: str, routing: str, tokens: int, k: int, experts: int, cores: int) -> None:
    assert_equals_formula(EXPERTS, experts_inputs(tokens, k, experts, 33, 20, routing), cores=cores)


@few(10)
@given(tokens=st.integers(16, 80), k=st.integers(1, 4), others=st.integers(0, 4), hidden=st.integers(24, 70), width=st.integers(24, 70),
       routing=st.sampled_from(ROUTINGS), cores=st.integers(1, 3))
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype, tokens: int, k: int, others: int, hidden: int, width: int,
                                    routing: str, cores: int) -> None:
    assert_within_bf16(EXPERTS, experts_inputs(tokens, k, k + others, hidden, width, routing), weight_dtype, cores)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_bf16_over_blocks_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype, routing: str) -> None:
    assert_within_bf16(EXPERTS, experts_inputs(1401, 2, 3, 40, 33, routing), weight_dtype, cores=2)


@few(20)
@given(tokens=st.integers(1, 80), hidden=st.integers(3, 70), width=st.integers(3, 70), cores=st.integers(1, 3),
       layout=st.sampled_from(sorted(LAYOUTS)), grad_layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_dense_swiglu_equals_the_formula(path: str, tokens: int, hidden: int, width: int, cores: int, layout: str, grad_layout: str,
                                         seed: int) -> None:
    assert_equals_formula(SWIGLU, swiglu_inputs(tokens, hidden, width, seed), layout, grad_layout, cores)


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_dense_swiglu_of_more_tokens_than_a_block_equals_the_formula(path: str, cores: int) -> None:
    assert_equals_formula(SWIGLU, swiglu_inputs(2300, 33, 20), cores=cores)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [50, 1300])
def test_dense_swiglu_in_bf16_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype, tokens: int) -> None:
    assert_within_bf16(SWIGLU, swiglu_inputs(tokens, 45, 70), weight_dtype, cores=2)


def test_dense_swiglu_keeps_leading_dimensions(path: str) -> None:
    x, *projections = swiglu_inputs(12, 20, 9)
    y = SWIGLU.function(x, *projections)
    assert torch.equal(SWIGLU.function(x.view(2, 3, 2, 20), *projections), y.view(2, 3, 2, 20))


def test_an_expert_without_tokens_gets_a_zero_gradient(path: str) -> None:
    *_, grad_gate_up, grad_down = results(EXPERTS, experts_inputs(40, 2, 6, 20, 9, "one takes all"))
    assert not grad_gate_up[:4].any() and not grad_down[:4].any()
    assert grad_gate_up[4:].flatten(1).any(1).all() and grad_down[4:].flatten(1).any(1).all()


def test_one_expert_chosen_twice_by_a_token_counts_twice(path: str) -> None:
    x, _, weights, gate_up, down = experts_inputs(9, 2, 3, 20, 9)
    assert_equals_formula(EXPERTS, (x, torch.ones(9, 2, dtype=torch.int64), weights, gate_up, down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_give_no_rows_and_zero_gradients(fast_path: str, dtype: torch.dtype) -> None:
    x, ids, weights, gate_up, down = experts_inputs(3, 2, 4, 40, 9)
    inputs = (x[:0].to(dtype), ids[:0], weights[:0], gate_up.to(dtype), down.to(dtype))
    y, grad_x, grad_weights, grad_gate_up, grad_down = results(EXPERTS, inputs)
    assert y.shape == grad_x.shape == (0, 40) and y.dtype == dtype and grad_weights.shape == (0, 2)
    assert torch.equal(grad_gate_up, torch.zeros_like(inputs[3])) and torch.equal(grad_down, torch.zeros_like(inputs[4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_swiglu_of_no_tokens_gives_no_rows_and_zero_gradients(path: str, dtype: torch.dtype) -> None:
    x, *projections = (t.to(dtype) for t in swiglu_inputs(3, 40, 9))
    y, grad_x, *grads = results(SWIGLU, (x[:0], *projections))
    assert y.shape == grad_x.shape == (0, 40)
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(grads, projections, strict=True))


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
@pytest.mark.parametrize("place", [0, 19])
def test_an_expert_id_out_of_range_is_an_index_error(variant: str, bad: int, place: int) -> None:
    x, ids, weights, gate_up, down = experts_inputs(10, 2, 7, 20, 9)
    ids.view(-1)[place] = bad
    with pytest.raises(IndexError, match=f"expert id {bad} is outside the 7 experts"):
        EXPERTS.function(x, ids, weights, gate_up, down)


def test_expert_ids_of_another_integer_type_are_understood_or_refused(variant: str) -> None:
    x, ids, weights, gate_up, down = experts_inputs(10, 2, 7, 20, 9)
    want = EXPERTS.function(x, ids, weights, gate_up, down)
    try:
        got = EXPERTS.function(x, ids.int(), weights, gate_up, down)
    except (TypeError, RuntimeError):
        return
    assert torch.equal(got, want)


def broken(value: float, dtype: torch.dtype, token: int = 8) -> tuple[Inputs, Inputs]:
    x, ids, weights, gate_up, down = experts_inputs(60, 2, 4, 40, 20)
    x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    bad = x.clone()
    bad[token, 3] = value
    return (x, ids, weights, gate_up, down), (bad, ids, weights, gate_up, down)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_token_breaks_its_own_row_and_its_own_experts_only(path: str, dtype: torch.dtype, value: float) -> None:
    clean, bad = broken(value, dtype)
    (y, grad_x, grad_weights, grad_gate_up, _), want = results(EXPERTS, bad), results(EXPERTS, clean)
    others = torch.arange(60) != 8
    assert y[8].isnan().any() and torch.equal(y[others], want[0][others])
    assert torch.equal(grad_x[others], want[1][others]) and torch.equal(grad_weights[others], want[2][others])
    elsewhere = [e for e in range(4) if e not in clean[1][8].tolist()]
    assert torch.equal(grad_gate_up[elsewhere], want[3][elsewhere]) and grad_gate_up[clean[1][8, 0]].isnan().any()


def test_a_broken_expert_breaks_its_own_tokens_only(path: str) -> None:
    (x, ids, weights, gate_up, down), _ = broken(0.0, torch.float32)
    want = EXPERTS.function(x, ids, weights, gate_up, down)
    gate_up[2, 5, 5] = float("nan")
    y = EXPERTS.function(x, ids, weights, gate_up, down)
    hit = (ids == 2).any(1)
    assert y[hit].isnan().all() and torch.equal(y[~hit], want[~hit])


@pytest.mark.parametrize("scale", [1e3, 1e9])
def test_huge_gates_stay_finite_and_exact(path: str, scale: float) -> None:
    x, *projections = swiglu_inputs(20, 40, 20)
    assert_equals_formula(SWIGLU, (x, scale * projections[0], *projections[1:]))
