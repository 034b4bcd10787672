"""Causal attention with grouped queries inside packed documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseling.kernels import reference
from sparseling.kernels.attention import attention, causal_mask

from .comparing import LAYOUTS, assert_close, assert_equals_formula, assert_within_bf16, few, gradients, results
from .operations import ATTENTION, attention_inputs

NAN = float("nan")
DOCUMENTS = [None, 0.0, 0.05, 0.5, 1.0]


@few(30)
@given(batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), queries=st.integers(1, 50), cached=st.integers(0, 40),
       head_dim=st.integers(1, 70), documents=st.sampled_from(DOCUMENTS), cores=st.integers(1, 3), layout=st.sampled_from(sorted(LAYOUTS)),
       grad_layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_output_and_gradients_equal_the_formula(path: str, batch: int, kv_heads: int, group: int, queries: int, cached: int, head_dim: int,
                                                documents: float | None, cores: int, layout: str, grad_layout: str, seed: int) -> None:
    inputs = attention_inputs(batch, kv_heads, group, queries, cached, head_dim, documents, seed)
    assert_equals_formula(ATTENTION, inputs, layout, grad_layout, cores)


@pytest.mark.parametrize(("queries", "cached", "cores"), [(128, 0, 2), (129, 0, 3), (300, 0, 2), (5, 700, 1), (130, 513, 2), (600, 0, 3)])
@pytest.mark.parametrize("documents", [None, 0.01])
def test_more_keys_than_a_block_equal_the_formula(fast_path: str, queries: int, cached: int, documents: float | None, cores: int) -> None:
    assert_equals_formula(ATTENTION, attention_inputs(1, 2, 2, queries, cached, 33, documents), cores=cores)


@few(10)
@given(batch=st.integers(1, 3), kv_heads=st.integers(1, 2), group=st.integers(1, 3), queries=st.integers(8, 60), cached=st.integers(0, 40),
       head_dim=st.integers(24, 70), documents=st.sampled_from([None, 0.05]), cores=st.integers(1, 3))
def test_bf16_stays_within_rounding(fast_path: str, batch: int, kv_heads: int, group: int, queries: int, cached: int, head_dim: int,
                                    documents: float | None, cores: int) -> None:
    inputs = attention_inputs(batch, kv_heads, group, queries, cached, head_dim, documents)
    assert_within_bf16(ATTENTION, inputs, torch.bfloat16, cores)


@pytest.mark.parametrize("documents", [None, 0.01])
def test_bf16_over_blocks_stays_within_rounding(fast_path: str, documents: float | None) -> None:
    assert_within_bf16(ATTENTION, attention_inputs(1, 2, 2, 401, 170, 45, documents), torch.bfloat16, cores=2)


def test_a_document_is_computed_as_if_alone(variant: str) -> None:
    q, k, v, _ = attention_inputs(1, 1, 2, 300, 0, 32)
    starts = torch.tensor([0] * 150 + [150] * 150, dtype=torch.int32)[None]
    second = attention(q[:, :, 150:], k[:, :, 150:], v[:, :, 150:])
    torch.testing.assert_close(attention(q, k, v, None, starts)[:, :, 150:], second, atol=1e-6, rtol=1e-5)


def test_queries_after_a_cache_give_the_rows_of_the_whole(path: str) -> None:
    q, k, v, first_key = attention_inputs(2, 2, 2, 90, 0, 32, documents=0.05)
    whole, rest = attention(q, k, v, None, first_key), attention(q[:, :, 57:], k, v, None, first_key[:, 57:])
    torch.testing.assert_close(rest, whole[:, :, 57:], atol=1e-6, rtol=1e-5)


def random_mask(batch: int, size: int) -> Tensor:
    mask = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(3)) < 0.5
    return mask | torch.eye(size, dtype=torch.bool)


def test_a_mask_is_obeyed_with_gradients(fast_path: str) -> None:
    q, k, v = (t.requires_grad_() for t in attention_inputs(2, 2, 3, 19, 0, 8)[:3])
    mask = random_mask(2, 19)
    got, want = attention(q, k, v, mask), reference.attention(q, k, v, mask)
    assert_close(got.detach(), want.detach().double(), 1e-5)
    for a, b in zip(gradients(got, (q, k, v)), gradients(want, (q, k, v)), strict=True):
        assert_close(a, b.double(), 1e-5)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_mask_of_a_causal_call_says_the_same(path: str, documents: float | None) -> None:
    q, k, v, first_key = attention_inputs(2, 1, 2, 23, 6, 16, documents)
    mask = causal_mask(23, 29, first_key, q.device)
    torch.testing.assert_close(attention(q, k, v, None, first_key), attention(q, k, v, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_document_starts_may_be_any_integers_in_any_layout(path: str, index_dtype: torch.dtype) -> None:
    q, k, v, first_key = attention_inputs(2, 1, 2, 23, 6, 16, documents=0.1)
    want = attention(q, k, v, None, first_key)
    assert torch.equal(attention(q, k, v, None, LAYOUTS["reversed"](first_key.to(index_dtype))), want)


def test_far_apart_scores_stay_right(path: str) -> None:
    q, k, v, first_key = attention_inputs(1, 2, 2, 70, 0, 32, documents=0.05)
    want = ATTENTION.formula(*(t.double() for t in (100 * q, k, v)), first_key)
    assert_close(attention(100 * q, k, v, None, first_key), want, 1e-3)


@pytest.mark.parametrize("queries", [90, 700])
def test_rising_scores_are_rescaled_over_blocks(fast_path: str, queries: int) -> None:
    q, k, v, _ = attention_inputs(1, 1, 1, queries, 0, 32)
    q, k = q.abs(), k.abs() * torch.linspace(0, 10, queries)[:, None]
    assert_equals_formula(ATTENTION, (q, k, v, None))


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_sequence_breaks_no_other(path: str, dtype: torch.dtype, part: int) -> None:
    *tensors, first_key = attention_inputs(3, 2, 2, 45, 0, 40, documents=0.05)
    tensors = [t.to(dtype) for t in tensors]
    want = results(ATTENTION, (*tensors, first_key))
    tensors[part] = tensors[part].clone()
    tensors[part][1] = NAN
    for got, clean in zip(results(ATTENTION, (*tensors, first_key)), want, strict=True):
        assert torch.equal(got[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_token_shows_in_its_own_row(path: str, dtype: torch.dtype, part: int) -> None:
    tensors = [t.to(dtype) for t in attention_inputs(1, 2, 2, 45, 0, 40)[:3]]
    tensors[part][:, :, 20] = NAN
    assert attention(*tensors)[:, :, 20].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_query_breaks_no_other_row(path: str, dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in attention_inputs(1, 2, 2, 45, 0, 40)[:3])
    want = attention(q, k, v)
    q[:, :, 20] = NAN
    others = torch.arange(45) != 20
    assert torch.equal(attention(q, k, v)[:, :, others], want[:, :, others])


def test_a_first_key_before_the_first_one_means_the_first(variant: str) -> None:
    query, key, value = (torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    starts = torch.tensor([[-90, 0, 1]])
    assert torch.equal(attention(query, key, value, None, starts), attention(query, key, value, None, starts.clamp(min=0)))
