"""Choosing experts and sorting pairs by expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseling.kernels import reference
from sparseling.kernels.route import choose_experts, sort_by_expert

from .comparing import few, threads
from .operations import generator


@few(40)
@given(tokens=st.integers(0, 60), groups=st.integers(1, 6), size=st.integers(2, 9), data=st.data(), cores=st.integers(1, 3),
       seed=st.integers(0, 99))
def test_chosen_experts_equal_the_reference(fast_path: str, tokens: int, groups: int, size: int, data: st.DataObject, cores: int,
                                            seed: int) -> None:
    kept = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, kept * size))
    scores = torch.randn(tokens, groups * size, generator=generator(seed)) - 1
    with threads(cores):
        assert torch.equal(choose_experts(scores, groups, kept, k), reference.choose_experts(scores, groups, kept, k))


@pytest.mark.parametrize("groups", [1, 4])
def test_of_equal_scores_the_first_experts_win(variant: str, groups: int) -> None:
    assert choose_experts(torch.zeros(2, 16), groups, min(groups, 2), 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_broken_scores_still_choose_different_experts_in_range(variant: str, value: float, groups: int) -> None:
    scores = torch.full((3, 16), value)
    scores[1, 3:9] = 1.0
    for ids in choose_experts(scores, groups, min(groups, 2), 6).tolist():
        assert len(set(ids)) == 6 and all(0 <= e < 16 for e in ids)


def test_scores_may_lie_in_any_layout(variant: str) -> None:
    scores = torch.randn(16, 7, generator=generator(0))
    assert torch.equal(choose_experts(scores.t(), 4, 2, 3), choose_experts(scores.t().contiguous(), 4, 2, 3))


@few(30)
@given(tokens=st.integers(0, 60), k=st.integers(1, 4), experts=st.integers(1, 20), seed=st.integers(0, 99))
def test_pairs_are_sorted_stably_by_expert(variant: str, tokens: int, k: int, experts: int, seed: int) -> None:
    ids = torch.randint(0, experts, (tokens, k), generator=generator(seed))
    order, ends = sort_by_expert(ids, experts)
    assert order.tolist() == ids.flatten().argsort(stable=True).tolist()
    assert ends.tolist() == ids.flatten().bincount(minlength=experts).cumsum(0).tolist()


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_an_id_out_of_range_is_named(variant: str, bad: int) -> None:
    with pytest.raises(IndexError, match=f"expert id {bad} is outside the 5 experts"):
        sort_by_expert(torch.tensor([[0, 4], [bad, 1]]), 5)


def test_more_experts_than_the_kept_groups_hold_are_refused(variant: str) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        choose_experts(torch.zeros(1, 8), 4, 1, 4)
