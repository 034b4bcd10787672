"""Cross entropy with the loss on the log normaliser."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from .comparing import LAYOUTS, assert_equals_formula, assert_within_bf16, few, results
from .operations import CROSS_ENTROPY, cross_entropy_inputs

NAN = float("nan")


@few(25)
@given(tokens=st.integers(1, 90), hidden=st.integers(1, 70), vocabulary=st.integers(1, 150), z_weight=st.sampled_from([0.0, 1e-4, 0.1]),
       ignored=st.sampled_from([0.0, 0.4, 1.0]), cores=st.integers(1, 3), layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_sum_and_gradients_equal_the_formula(path: str, tokens: int, hidden: int, vocabulary: int, z_weight: float, ignored: float,
                                             cores: int, layout: str, seed: int) -> None:
    assert_equals_formula(CROSS_ENTROPY, cross_entropy_inputs(tokens, hidden, vocabulary, z_weight, ignored, seed), layout, cores=cores)


@pytest.mark.parametrize(("tokens", "vocabulary", "cores"), [(512, 512, 1), (513, 513, 2), (1030, 40, 3), (1025, 1100, 2), (513, 1100, 3)])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_more_tokens_and_vocabulary_than_a_block_equal_the_formula(path: str, tokens: int, vocabulary: int, ignored: float,
                                                                   cores: int) -> None:
    assert_equals_formula(CROSS_ENTROPY, cross_entropy_inputs(tokens, 33, vocabulary, 1e-3, ignored), cores=cores)


@few(10)
@given(tokens=st.integers(8, 90), hidden=st.integers(24, 70), vocabulary=st.integers(20, 150), z_weight=st.sampled_from([0.0, 1e-3]),
       cores=st.integers(1, 3))
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype, tokens: int, hidden: int, vocabulary: int, z_weight: float,
                                    cores: int) -> None:
    assert_within_bf16(CROSS_ENTROPY, cross_entropy_inputs(tokens, hidden, vocabulary, z_weight), weight_dtype, cores)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_over_blocks_stays_within_rounding(fast_path: str, weight_dtype: torch.dtype) -> None:
    assert_within_bf16(CROSS_ENTROPY, cross_entropy_inputs(1101, 40, 700, 1e-3), weight_dtype, cores=2)


@pytest.mark.parametrize("tokens", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_trained_token_costs_nothing_and_has_zero_gradients(path: str, dtype: torch.dtype, tokens: int) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(tokens, 20, 40, ignored=1.0)
    total, grad_hidden, grad_head = results(CROSS_ENTROPY, (hidden.to(dtype), head.to(dtype), labels, 0.1))
    assert total == 0 and grad_hidden.shape == hidden.shape and not grad_hidden.any() and not grad_head.any()


def test_ignored_tokens_have_a_zero_gradient_and_may_be_broken(fast_path: str) -> None:
    hidden, head, labels, z_weight = cross_entropy_inputs(60, 20, 40, 0.1)
    want = results(CROSS_ENTROPY, (hidden, head, labels, z_weight))
    hidden[labels == -100] = NAN
    got = results(CROSS_ENTROPY, (hidden, head, labels, z_weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and not got[1][labels == -100].any()


def test_gradients_scale_with_the_gradient_of_the_sum(path: str) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(30, 20, 40)
    hidden.requires_grad_(), head.requires_grad_()
    once = torch.autograd.grad(CROSS_ENTROPY.function(hidden, head, labels), [hidden, head])
    half = torch.autograd.grad(CROSS_ENTROPY.function(hidden, head, labels) / 2, [hidden, head])
    for a, b in zip(once, half, strict=True):
        torch.testing.assert_close(a / 2, b)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_may_be_wanted_by_either_operand_alone(path: str, wanted: int) -> None:
    inputs = list(cross_entropy_inputs(30, 20, 40))
    both = [t.clone().requires_grad_() for t in inputs[:2]]
    want = torch.autograd.grad(CROSS_ENTROPY.function(*both, *inputs[2:]), both)
    inputs[wanted].requires_grad_()
    (got,) = torch.autograd.grad(CROSS_ENTROPY.function(*inputs), [inputs[wanted]])
    assert torch.equal(got, want[wanted])


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_huge_logits_stay_exact(path: str, scale: float) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(40, 20, 70)
    assert_equals_formula(CROSS_ENTROPY, (hidden, scale * head, labels, 0.0))


@pytest.mark.parametrize("log_norm", [-64.0, -63.0, -64.001, -640.0])
def test_the_gradient_is_right_where_the_loss_on_the_normaliser_cancels_it(path: str, log_norm: float) -> None:
    # the gradient by a logit is p (1 + 2 z log_norm) less one for the label; the factor is zero where log_norm = -1 / (2 z)
    hidden, head = torch.full((1, 1), log_norm), torch.ones(1, 1)
    assert_equals_formula(CROSS_ENTROPY, (hidden, head, torch.zeros(1, dtype=torch.int64), 2**-7))


@pytest.mark.parametrize("bad", [40, 41, 2**40])
@pytest.mark.parametrize("place", [0, 29])
def test_a_label_past_the_vocabulary_is_an_index_error(variant: str, bad: int, place: int) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(30, 20, 40)
    labels[place] = bad
    with pytest.raises(IndexError, match=f"label {bad} is outside the vocabulary of 40"):
        CROSS_ENTROPY.function(hidden, head, labels)


@pytest.mark.parametrize("bad", [-1, -101])
def test_a_negative_label_other_than_the_ignored_one_is_an_index_error(path: str, bad: int) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(30, 20, 40)
    labels[3] = bad
    with pytest.raises(IndexError):
        CROSS_ENTROPY.function(hidden, head, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_broken_token_breaks_the_sum_but_no_other_tokens_gradient(path: str, dtype: torch.dtype) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(60, 20, 40, ignored=0.0)
    hidden, head = hidden.to(dtype), head.to(dtype)
    want = results(CROSS_ENTROPY, (hidden, head, labels, 0.0))
    bad = hidden.clone()
    bad[7, 2] = NAN
    total, grad_hidden, _ = results(CROSS_ENTROPY, (bad, head, labels, 0.0))
    others = torch.arange(60) != 7
    assert total.isnan() and torch.equal(grad_hidden[others], want[1][others])


def test_the_gradients_of_a_broken_token_are_broken(path: str) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(60, 20, 40, ignored=0.0)
    hidden[7, 2] = NAN
    _, grad_hidden, grad_head = results(CROSS_ENTROPY, (hidden, head, labels, 0.0))
    assert grad_hidden[7].isnan().all() and grad_head.isnan().any(1).all()


@pytest.mark.parametrize("vocabulary", [40, 600])
def test_a_broken_head_row_breaks_the_sum_even_where_it_is_no_label(path: str, vocabulary: int) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(60, 20, vocabulary, ignored=0.0)
    labels[labels == 3] = 4
    head[3] = NAN
    assert CROSS_ENTROPY.function(hidden, head, labels).isnan()


def test_an_infinite_logit_gives_an_infinite_or_undefined_loss(path: str) -> None:
    hidden, head, labels, _ = cross_entropy_inputs(60, 20, 40, ignored=0.0)
    hidden[7, 2] = math.inf
    assert not CROSS_ENTROPY.function(hidden, head, labels).isfinite()
