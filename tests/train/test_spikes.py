"""The spike rule: skip, bring the batch back, then take it slowly; never judge too early; never lose a batch."""

from __future__ import annotations

import math

import pytest

from sparseling.train.spikes import SpikeRule, SpikeState, due_batch, is_spike, judge, remember

RULE = SpikeRule()


def calm(steps: int = 40) -> SpikeState:
    state = SpikeState()
    for step in range(steps):
        loss = 3.0 + 0.01 * (step % 5)
        remember(RULE, state, judge(RULE, state, loss, 1.0, False), step, (step, 1), loss, 1.0, False, seed=0)
    return state


@pytest.mark.parametrize(
    ("loss", "grad_norm", "spike"),
    [
        (3.02, 1.0, False),
        (3.2, 1.2, False),
        (3.5, 1.0, True),
        (3.0, 9.0, True),
        (math.nan, 1.0, True),
        (3.0, math.inf, True),
        (2.0, 1.0, False),
    ],
)
def test_what_counts_as_a_spike(loss: float, grad_norm: float, spike: bool) -> None:
    assert is_spike(RULE, calm(), loss, grad_norm) is spike


def test_nothing_but_non_finite_is_judged_before_half_a_window() -> None:
    state = calm(RULE.window // 2 - 1)
    assert not is_spike(RULE, state, 100.0, 1e6) and is_spike(RULE, state, math.nan, 1.0)


def test_a_skipped_batch_comes_back_once_and_is_then_taken_slowly() -> None:
    state = calm()
    assert judge(RULE, state, 9.0, 1.0, False) == "skip"
    remember(RULE, state, "skip", 40, (640, 16), 9.0, 1.0, False, seed=5)
    due = state.postponed[0][0]
    assert 40 + RULE.delay_steps <= due < 40 + 2 * RULE.delay_steps
    assert due_batch(state, due - 1) is None
    assert due_batch(state, due) == (640, 16) and due_batch(state, due + 1) is None
    assert judge(RULE, state, 9.0, 1.0, True) == "take slowly"
    assert judge(RULE, state, math.nan, 1.0, True) == "skip"


def test_a_lasting_change_of_level_is_followed_not_skipped_for_ever() -> None:
    state, verdicts = calm(), []
    for step in range(40, 120):
        verdict = judge(RULE, state, 5.0, 1.0, False)
        remember(RULE, state, verdict, step, (step, 1), 5.0, 1.0, False, seed=0)
        verdicts.append(verdict)
    assert verdicts[:3] == ["skip"] * 3 and verdicts[3] == "take slowly" and verdicts[-1] == "take"


def test_the_state_is_a_function_of_what_happened() -> None:
    assert SpikeState(**calm().to_dict()) == calm()
