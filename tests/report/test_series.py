"""Thinning, smoothing and binning against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest

from sparseling.report.series import bin_columns, curve, join, over_layers, smooth, thin


@pytest.mark.parametrize("points", [0, 1, 2, 399, 401, 5000, 100_000])
def test_thin_keeps_extremes_ends_and_order(points: int) -> None:
    random = np.random.default_rng(points)
    y = random.normal(0, 1, points)
    line = curve(np.arange(points), y)
    short = thin(line, 200)
    assert len(short.x) <= 3 * 200 + 2
    assert np.all(np.diff(short.x) > 0)
    if points:
        assert short.y.min() == y.min() and short.y.max() == y.max()
        assert short.x[0] == 0 and short.x[-1] == points - 1
    # Every kept point is a point of the line, not an invention.
    assert np.array_equal(short.y, y[short.x.astype(int)])


def test_thin_keeps_a_single_spike_at_every_place() -> None:
    for place in (0, 1, 4321, 9998, 9999):
        y = np.zeros(10_000)
        y[place] = 7.0
        assert thin(curve(np.arange(10_000), y)).y.max() == 7.0


def test_thin_keeps_gaps() -> None:
    y = np.ones(5000)
    y[2000:2400] = np.nan
    y[3000] = np.inf
    short = thin(curve(np.arange(5000), y))
    assert np.isnan(short.y).any() and np.isinf(short.y).any()
    inside = (short.x >= 2000) & (short.x < 2400)
    assert not np.isfinite(short.y[inside]).any()


def test_thin_of_nothing_finite() -> None:
    short = thin(curve(np.arange(3000), np.full(3000, np.nan)))
    assert 0 < len(short.x) <= 602 and np.isnan(short.y).all()


def test_curve_drops_points_without_a_place() -> None:
    line = curve([0, np.nan, 2, np.inf], [1, 2, 3, 4])
    assert line.x.tolist() == [0, 2] and line.y.tolist() == [1, 3]


def test_join_breaks_between_stages() -> None:
    line = join([curve([0, 1], [5, 4]), curve([], []), curve([1, 2], [3, 2])])
    assert line.x.tolist() == [0, 1, 1, 1, 2]
    assert line.y[:2].tolist() == [5, 4] and np.isnan(line.y[2]) and line.y[3:].tolist() == [3, 2]
    assert len(join([]).x) == 0


@pytest.mark.parametrize("window", [1, 2, 5, 8, 1000])
def test_smooth_is_the_mean_of_finite_neighbours(window: int) -> None:
    random = np.random.default_rng(window)
    y = random.normal(0, 1, 60)
    y[[7, 8, 30]] = np.nan
    found = smooth(curve(np.arange(60), y), window).y
    half = min(window, 60) // 2
    for index in range(60):
        near = y[max(0, index - half) : index + half + 1]
        wanted = np.nan if np.isnan(y[index]) else near[np.isfinite(near)].mean()
        np.testing.assert_allclose(found[index], wanted, rtol=1e-12)


def test_smooth_forgets_a_huge_value_outside_its_window() -> None:
    y = np.ones(300)
    y[50] = 1e30
    np.testing.assert_array_equal(smooth(curve(np.arange(300), y), 10).y[100:], 1.0)


def test_bins_are_means_of_what_falls_into_them() -> None:
    x = np.array([0.0, 1, 2, 5, 9.9, 10])
    values = np.array([[1.0, 10], [3, np.nan], [5, 30], [7, np.inf], [9, 50], [11, 70]])
    found = bin_columns(x, values, columns=5, end=10)
    np.testing.assert_array_equal(found, [[2, 5, 7, np.nan, 10], [10, 30, np.nan, np.nan, 60]])


def test_over_layers_is_min_median_max_of_finite_values() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (50, 7))
    values[random.random((50, 7)) < 0.3] = np.nan
    values[3] = np.nan
    values[4, 2] = np.inf
    low, middle, high = over_layers(values)
    for index, row in enumerate(values):
        good = row[np.isfinite(row)]
        wanted = (good.min(), np.median(good), good.max()) if len(good) else (np.nan,) * 3
        np.testing.assert_allclose((low[index], middle[index], high[index]), wanted)
