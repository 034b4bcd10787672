"""RMSNorm, and QK-norm with rotation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .comparing import LAYOUTS, assert_equals_formula, assert_within_bf16, few, results
from .operations import QUERY_KEY_VALUE, RMS_NORM, query_key_value_inputs, rms_norm_inputs

WEIGHT_DTYPES = [torch.float32, torch.bfloat16]


@few(25)
@given(rows=st.integers(1, 90), size=st.integers(1, 100), cores=st.integers(1, 3), layout=st.sampled_from(sorted(LAYOUTS)),
       grad_layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_norm_equals_the_formula_with_gradients(path: str, rows: int, size: int, cores: int, layout: str, grad_layout: str,
                                                seed: int) -> None:
    assert_equals_formula(RMS_NORM, rms_norm_inputs(rows, size, seed), layout, grad_layout, cores)


@few(12)
@given(rows=st.integers(4, 90), size=st.integers(24, 100), cores=st.integers(1, 3))
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_norm_in_bf16_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype, rows: int, size: int, cores: int) -> None:
    assert_within_bf16(RMS_NORM, rms_norm_inputs(rows, size), weight_dtype, cores)


@pytest.mark.parametrize("shape", [(70,), (2, 70), (2, 3, 70), (2, 3, 1, 70)])
def test_norm_keeps_leading_dimensions(path: str, shape: tuple[int, ...]) -> None:
    x, weight, eps = rms_norm_inputs(6, 70)
    rows = torch.Size(shape).numel() // 70
    y = RMS_NORM.function(x[:rows].view(shape), weight, eps)
    assert y.shape == shape
    torch.testing.assert_close(y.view(rows, 70), RMS_NORM.formula(x[:rows], weight, eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_no_rows_has_a_zero_gradient(path: str, dtype: torch.dtype) -> None:
    y, grad_x, grad_weight = results(RMS_NORM, (torch.zeros(0, 40, dtype=dtype), torch.ones(40), 1e-6))
    assert y.shape == grad_x.shape == (0, 40) and torch.equal(grad_weight, torch.zeros(40))


@pytest.mark.parametrize("size", [1, 33, 64])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_norm_of_tiny_and_huge_rows_equals_the_formula(path: str, scale: float, size: int) -> None:
    x, weight, eps = rms_norm_inputs(5, size)
    assert_equals_formula(RMS_NORM, (scale * x, weight, eps))


def test_a_broken_row_stays_alone(path: str) -> None:
    x, weight, eps = rms_norm_inputs(12, 40)
    want = results(RMS_NORM, (x, weight, eps))
    x[5, 1] = float("nan")
    y, grad_x, _ = results(RMS_NORM, (x, weight, eps))
    others = torch.arange(12) != 5
    assert y[5].isnan().all() and torch.equal(y[others], want[0][others]) and torch.equal(grad_x[others], want[1][others])


@few(30)
@given(batch=st.integers(1, 3), seq=st.integers(1, 20), heads=st.integers(1, 5), kv_heads=st.integers(1, 3), head_dim=st.integers(1, 70),
       share=st.sampled_from([0.0, 0.3, 0.5, 1.0]), norms=st.booleans(), cores=st.integers(1, 3),
       layout=st.sampled_from(["dense", "sliced"]), grad_layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_queries_keys_and_values_equal_the_formula(path: str, batch: int, seq: int, heads: int, kv_heads: int, head_dim: int, share: float,
                                                   norms: bool, cores: int, layout: str, grad_layout: str, seed: int) -> None:
    rotary_dim = int(head_dim * share) // 2 * 2
    inputs = query_key_value_inputs(batch, seq, heads, kv_heads, head_dim, rotary_dim, norms, seed)
    assert_equals_formula(QUERY_KEY_VALUE, inputs, layout, grad_layout, cores)


@pytest.mark.parametrize("rotary_dim", range(0, 41, 4))
@pytest.mark.parametrize("norms", [False, True])
def test_any_part_of_a_head_may_be_rotated(path: str, rotary_dim: int, norms: bool) -> None:
    assert_equals_formula(QUERY_KEY_VALUE, query_key_value_inputs(2, 7, 3, 2, 40, rotary_dim, norms))


@few(12)
@given(seq=st.integers(4, 30), heads=st.integers(1, 5), kv_heads=st.integers(1, 3), head_dim=st.integers(24, 70),
       share=st.sampled_from([0.0, 0.5, 1.0]), norms=st.booleans(), cores=st.integers(1, 3))
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES)
def test_queries_keys_and_values_in_bf16_stay_within_rounding(fast_path: str, weight_dtype: torch.dtype, seq: int, heads: int,
                                                              kv_heads: int, head_dim: int, share: float, norms: bool, cores: int) -> None:
    inputs = query_key_value_inputs(2, seq, heads, kv_heads, head_dim, int(head_dim * share) // 2 * 2, norms)
    assert_within_bf16(QUERY_KEY_VALUE, inputs, weight_dtype, cores)


def test_a_broken_head_of_a_token_stays_alone(path: str) -> None:
    rows, *rest = query_key_value_inputs(2, 9, 3, 2, 40, 20)
    want = results(QUERY_KEY_VALUE, (rows, *rest))
    bad = rows.clone()
    bad.view(2, 9, 7, 40)[1, 4, 2, 3] = float("nan")
    y, grad_rows, _, grad_key_weight = results(QUERY_KEY_VALUE, (bad, *rest))
    here = torch.zeros(2, 7, 9, dtype=torch.bool)
    here[1, 2, 4] = True
    assert y[here].isnan().any() and torch.equal(y[~here], want[0][~here])
    by_head, clean = (t.view(2, 9, 7, 40).transpose(1, 2) for t in (grad_rows, want[1]))
    assert torch.equal(by_head[~here], clean[~here]) and torch.equal(grad_key_weight, want[3])
