"""Axes: ticks enclose the data, are round, and places are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseling.report.scales import nice_step, run_scale, tick_label, value_scale

VALUES = st.lists(st.floats(-1e30, 1e30) | st.sampled_from([0.0, 1e-12, 3.0, math.nan, math.inf]), max_size=8)


@given(VALUES, st.booleans(), st.booleans())
def test_ticks_enclose_the_data(values: list[float], zero: bool, log: bool) -> None:
    scale = value_scale(values, zero=zero, log=log)
    drawn = [value for value in values if math.isfinite(value)]
    assert scale.low < scale.high and 2 <= len(scale.ticks) <= 20
    assert all(scale.low <= value <= scale.high for value in drawn)
    slack = 1e-9 * max(abs(scale.low), abs(scale.high))
    assert scale.ticks[0] <= scale.low + slack and scale.ticks[-1] >= scale.high - slack
    assert list(scale.ticks) == sorted(set(scale.ticks))
    for value in drawn:
        assert -1e-9 <= scale.place(value) <= 1 + 1e-9


@given(VALUES)
def test_the_run_axis_spans_the_data(values: list[float]) -> None:
    scale = run_scale(values)
    drawn = [value for value in values if math.isfinite(value)]
    assert scale.low < scale.high and all(scale.low <= value <= scale.high for value in drawn)
    assert all(-1e-9 <= scale.place(tick) <= 1 + 1e-9 for tick in scale.ticks) and len(scale.ticks) <= 12


@given(st.floats(1e-100, 1e100))
def test_steps_are_round_and_large_enough(rough: float) -> None:
    step = nice_step(rough)
    digits = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    assert any(math.isclose(digits, wanted, rel_tol=1e-6) for wanted in (1, 2, 2.5, 5, 10))
    assert rough * (1 - 1e-8) <= step <= rough * 2.6


@pytest.mark.parametrize(("low", "high"), [(0.003, 0.9), (1.0, 40.0), (1e-5, 1e5), (1e-150, 1e150), (2.0, 200.0)])
def test_log_scale_places_by_ratio(low: float, high: float) -> None:
    scale = value_scale([low, high], log=True)
    assert scale.log and scale.ticks[0] <= low and scale.ticks[-1] >= high and len(scale.ticks) <= 8
    middle = math.sqrt(low) * math.sqrt(high)
    np.testing.assert_allclose(scale.place(middle), (scale.place(low) + scale.place(high)) / 2, atol=1e-9)
    assert math.isnan(scale.place(0.0)) and math.isnan(scale.place(-1.0))


def test_log_is_refused_where_it_cannot_stand() -> None:
    assert not value_scale([0.0, 1000.0], log=True).log
    assert not value_scale([-1.0, 1000.0], log=True).log
    assert not value_scale([1.0, 2.0], log=True).log


def test_zero_and_top_are_reached() -> None:
    scale = value_scale([40.0, 45.0], zero=True, top=70.0)
    assert scale.low == 0 and scale.high >= 70


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [
        (0.25, 0.25, "0.25"), (2.0, 0.5, "2"), (-1.25, 0.25, "−1.25"), (0.0003, 0.00005, "3e-4"), (0.0, 1e-6, "0"),
        (2_500_000, 500_000, "2.5\u00a0M"), (10_000, 2.5, "10,000"),
    ],
)
def test_tick_labels(value: float, step: float, text: str) -> None:
    assert tick_label(value, step) == text


@given(st.floats(-1e6, 1e6), st.floats(1e-4, 1e6))
def test_labels_of_an_axis_differ(low: float, span: float) -> None:
    labels = value_scale([low, low + span]).labels
    assert len(set(labels)) == len(labels)
