"""Dense projections."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .comparing import LAYOUTS, assert_equals_formula, assert_within_bf16, few
from .operations import LINEAR, linear_inputs


@few(30)
@given(tokens=st.integers(1, 90), size_in=st.integers(1, 100), size_out=st.integers(1, 100), bias=st.booleans(), cores=st.integers(1, 3),
       layout=st.sampled_from(sorted(LAYOUTS)), grad_layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_output_and_gradients_equal_the_formula(path: str, tokens: int, size_in: int, size_out: int, bias: bool, cores: int, layout: str,
                                                grad_layout: str, seed: int) -> None:
    assert_equals_formula(LINEAR, linear_inputs(tokens, size_in, size_out, bias, seed), layout, grad_layout, cores)


@pytest.mark.parametrize(("tokens", "cores"), [(2048, 1), (2049, 2), (4113, 3)])
def test_more_tokens_than_a_chunk_equal_the_formula(path: str, tokens: int, cores: int) -> None:
    assert_equals_formula(LINEAR, linear_inputs(tokens, 33, 65), cores=cores)


@few(12)
@given(tokens=st.integers(8, 90), size_in=st.integers(24, 100), size_out=st.integers(24, 100), cores=st.integers(1, 3))
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype, tokens: int, size_in: int, size_out: int,
                                    cores: int) -> None:
    assert_within_bf16(LINEAR, linear_inputs(tokens, size_in, size_out), weight_dtype, cores)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_over_chunks_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype) -> None:
    assert_within_bf16(LINEAR, linear_inputs(2101, 40, 70), weight_dtype, cores=2)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4), (2, 1, 3)])
def test_any_leading_dimensions_are_kept(path: str, shape: tuple[int, ...]) -> None:
    x, weight, bias = linear_inputs(24, 10, 6)
    x = x[:max(1, torch.Size(shape).numel())].reshape(*shape, 10)
    torch.testing.assert_close(LINEAR.function(x, weight, bias), x @ weight.T + bias)
    with torch.no_grad():
        torch.testing.assert_close(LINEAR.function(x, weight, bias), x @ weight.T + bias)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_may_be_wanted_by_either_operand_alone(path: str, wanted: int) -> None:
    operands = list(linear_inputs(20, 33, 34, bias=False)[:2])
    operands[wanted].requires_grad_()
    (got,) = torch.autograd.grad(LINEAR.function(*operands).sum(), [operands[wanted]])
    want = operands[1].sum(0).expand(20, 33) if wanted == 0 else operands[0].sum(0).expand(34, 33)
    torch.testing.assert_close(got, want.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_give_no_rows_and_a_zero_gradient(path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.zeros(*shape, 40, dtype=dtype, requires_grad=True), torch.randn(33, 40, dtype=dtype, requires_grad=True)
    y = LINEAR.function(x, weight)
    assert y.shape == (*shape, 33) and y.dtype == dtype
    grad_x, grad_weight = torch.autograd.grad(y.sum(), [x, weight])
    assert grad_x.shape == x.shape and torch.equal(grad_weight, torch.zeros(33, 40, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_token_breaks_its_own_row_only(path: str, dtype: torch.dtype, value: float) -> None:
    x, weight, _ = (t.to(dtype) for t in linear_inputs(21, 45, 34))
    clean = LINEAR.function(x, weight)
    x[9, 4] = value
    y = LINEAR.function(x, weight)
    others = torch.arange(21) != 9
    assert not y[9].isfinite().any() and torch.equal(y[others], clean[others])


def test_a_broken_gradient_breaks_its_own_row_of_the_inputs_gradient_only(path: str) -> None:
    x, weight, _ = linear_inputs(21, 45, 34)
    grad = torch.ones(21, 34)
    grad[5, 3] = float("nan")
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(LINEAR.function(x, weight), [x], grad)
    assert grad_x[5].isnan().all() and grad_x[torch.arange(21) != 5].isfinite().all()
