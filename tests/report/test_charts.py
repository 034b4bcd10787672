"""Pictures: well-formed, points where the data says, nothing lost or invented, safe against hostile names."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from sparseling.report.bars import Bar, Change, change_bars, interval_bars, length_bars
from sparseling.report.charts import Axes, Band, Boundary, Flags, Level, Line, line_chart, line_table
from sparseling.report.heatmap import AROUND_ONE, VIOLATION, Grid, heat_map
from sparseling.report.series import curve

HOSTILE = '"><script>alert(1)</script> & <hr x=\'1\'>\x00'


def parsed(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<div>{picture}</div>")


def by_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if name in (element.get("class") or "").split()]


def share(text: str | None) -> float:
    assert text is not None and text.endswith("%")
    return round(float(text[:-1]) / 100, 6)


def ends(svg: ElementTree.Element, name: str) -> tuple[float, float]:
    low, high = (float(part) for part in svg.get(name, "").split())
    return low, high


def stretches(root: ElementTree.Element, line: str) -> list[np.ndarray]:
    """The data points that a drawn line stands for: its path with both scales inverted, an array [points, 2] a stretch."""
    svg = by_class(root, "lines")[0]
    (x_low, x_high), (y_low, y_high), log = ends(svg, "data-x"), ends(svg, "data-y"), svg.get("data-log") == "1"
    path = next(element for element in root.iter("path") if element.get("data-name") == line)
    found = []
    for stretch in (path.get("d") or "").split("M")[1:]:
        points = np.array([float(number) for number in re.findall(r"-?[\d.]+", stretch)]).reshape(-1, 2)[1:] / 1000
        up = 1 - points[:, 1]
        y = 10 ** (math.log10(y_low) + up * math.log10(y_high / y_low)) if log else y_low + up * (y_high - y_low)
        found.append(np.stack([x_low + points[:, 0] * (x_high - x_low), y], axis=1))
    return found


@pytest.mark.parametrize("log", [False, True])
def test_points_land_where_the_data_says(log: bool) -> None:
    random = np.random.default_rng(0)
    x = np.sort(random.uniform(0, 5e6, 60))
    y = np.exp(random.normal(0, 2.5, 60))
    root = parsed(line_chart("Loss", Axes("nats", log=log), [Line("loss", curve(x, y))]))
    svg = by_class(root, "lines")[0]
    assert svg.get("data-log") == str(int(log))
    (found,) = stretches(root, "loss")
    np.testing.assert_allclose(found[:, 0], x, atol=1e-4 * 5e6)
    low, high = ends(svg, "data-y")
    np.testing.assert_allclose(found[:, 1], y, **({"rtol": 1.1e-4 * math.log(high / low)} if log else {"atol": 1e-4 * (high - low)}))


def test_ticks_stand_at_their_values_and_cover_the_data() -> None:
    root = parsed(line_chart("Loss", Axes("nats"), [Line("loss", curve([0, 40, 97], [2.2, 7.9, 3.1]))]))
    svg = by_class(root, "lines")[0]
    for axis, place, invert in (("y", "y", True), ("x", "x", False)):
        low, high = ends(svg, f"data-{axis}")
        ticks = [element for element in by_class(root, "tick") if axis in (element.get("class") or "").split()]
        for tick in ticks:
            at = 1 - share(tick.get(place)) if invert else share(tick.get(place))
            assert math.isclose(float(tick.text or "nan"), low + at * (high - low), abs_tol=1e-3 * (high - low))
        values = [float(tick.text or "nan") for tick in ticks]
        if axis == "y":
            assert min(values) <= 2.2 and max(values) >= 7.9
        else:
            assert min(values) == 0 and max(values) <= 97 <= max(values) + (values[1] - values[0])


def test_gaps_break_the_line_and_infinite_values_are_counted() -> None:
    y = [1.0, 2.0, math.nan, 4.0, math.inf, 6.0, -math.inf, 7.0]
    root = parsed(line_chart("Loss", Axes("nats"), [Line("loss", curve(range(8), y))]))
    found = stretches(root, "loss")
    assert [len(stretch) for stretch in found] == [2, 1, 1, 1]
    np.testing.assert_allclose([point[1] for stretch in found for point in stretch], [1, 2, 4, 6, 7], atol=1e-3)
    assert "2 infinite values" in (by_class(root, "note")[0].text or "")


@pytest.mark.parametrize("y", [[], [math.nan], [math.inf, -math.inf, math.nan], [1e300, -1e300]])
def test_nothing_to_draw_says_so_or_draws_nothing(y: list[float]) -> None:
    root = parsed(line_chart("Loss", Axes("nats"), [Line("loss", curve(range(len(y)), y))]))
    assert by_class(root, "missing") or not stretches(root, "loss")
    root = parsed(heat_map("Load", np.array([y]) if y else np.zeros((0, 0)), Grid(("0",), "expert", "x", whole=True), VIOLATION))
    assert by_class(root, "missing") or y == [1e300, -1e300]


def test_one_point_and_constant_lines_are_drawn() -> None:
    for x, y in (([5.0], [3.0]), ([0.0], [0.0]), ([1, 2, 3], [4, 4, 4]), ([1, 2], [1e-12, 1e-12]), ([1, 2], [-1e18, -1e18])):
        (found,) = stretches(parsed(line_chart("Loss", Axes("nats"), [Line("loss", curve(x, y))])), "loss")
        assert len(found) == len(y)
        np.testing.assert_allclose(found[:, 1], y, rtol=1e-3, atol=1e-3)


def test_dots_stand_on_their_points() -> None:
    root = parsed(line_chart("Bits", Axes("bits"), [Line("model", curve([0, 50, 80, 100], [3.0, math.nan, 2.0, 1.0]), dots=True)]))
    low, high = ends(by_class(root, "lines")[0], "data-y")
    dots = [(100 * share(dot.get("cx")), low + (1 - share(dot.get("cy"))) * (high - low)) for dot in by_class(root, "dot")]
    np.testing.assert_allclose(dots, [(0, 3), (80, 2), (100, 1)], atol=1e-3)


def test_levels_bands_stages_and_flags_stand_at_their_values() -> None:
    x = np.linspace(0, 100, 11)
    low, high = curve(x, np.full(11, 2.0)), curve(x, np.full(11, 6.0))
    root = parsed(line_chart(
        "Loss", Axes("nats", zero=True), [Line("loss", curve(x, x / 10))], [Band("all", low, high)], [Level("baseline", 4.0)],
        [Boundary(0, "first"), Boundary(30, "second"), Boundary(32, "third")], Flags("skipped", [50.0, 50.001, 80.0, math.nan]),
    ))
    svg = by_class(root, "lines")[0]
    bottom, top = ends(svg, "data-y")
    level = next(element for element in root.iter("line") if element.get("data-name") == "baseline")
    assert math.isclose(bottom + (1 - share(level.get("y1"))) * (top - bottom), 4.0, abs_tol=1e-3)
    points = np.array([point.split(",") for point in (next(root.iter("polygon")).get("points") or "").split()], dtype=float)
    np.testing.assert_allclose(sorted(set(bottom + (1 - points[:, 1] / 1000) * (top - bottom))), [2, 6], atol=1e-3 * top)
    assert [share(element.get("x1")) for element in by_class(svg, "stage")] == [0.3, 0.32]
    numbers = by_class(svg, "stage-number")
    assert [element.text for element in numbers] == ["1", "2", "3"]
    # Two stages that start close together must not print their numbers over one another.
    assert len({(element.get("x"), element.get("dx")) for element in numbers}) == 3
    gap = 900 * (share(numbers[2].get("x")) - share(numbers[1].get("x"))) + float(numbers[2].get("dx", 0)) - float(numbers[1].get("dx", 0))
    assert gap > 9
    assert [share(element.get("x")) for element in by_class(svg, "flag")] == [0.5, 0.8]


def test_hostile_names_stay_text() -> None:
    line = Line(HOSTILE, curve([0, 1], [1, 2]))
    pictures = [
        line_chart(HOSTILE, Axes(HOSTILE, x=HOSTILE), [line, line], [], [Level(HOSTILE, 1.5)], [Boundary(0, HOSTILE)] * 2),
        line_table(Axes(HOSTILE, x=HOSTILE), [line]),
        interval_bars(HOSTILE, [(HOSTILE, [Bar(HOSTILE, 0.5)])]),
        change_bars(HOSTILE, [Change(HOSTILE, 2.0, 1.0)]),
        length_bars(HOSTILE, [(HOSTILE, 1.0, HOSTILE)]),
        heat_map(HOSTILE, np.ones((1, 2)), Grid((HOSTILE,), HOSTILE, HOSTILE, whole=True), AROUND_ONE),
    ]
    for picture in pictures:
        root = parsed(picture)
        assert not list(root.iter("script")) and not list(root.iter("hr"))
        words = " ".join(root.itertext()) + " ".join(value for element in root.iter() for value in element.attrib.values())
        assert "<script>alert(1)</script>" in words


def test_pictures_have_words_for_those_who_cannot_see_them() -> None:
    root = parsed(line_chart("Loss", Axes("nats"), [Line("loss", curve([0, 1, 2], [5.0, 1.5, 2.5]))]))
    svg = by_class(root, "lines")[0]
    assert svg.get("role") == "img" and svg.get("aria-label") == "Loss. loss: first 5.000, last 2.500, lowest 1.500, highest 5.000"
    table = parsed(line_table(Axes("nats"), [Line("loss", curve([0, 1, 2], [5.0, 1.5, 2.5]))]))
    rows = [[cell.text for cell in row] for row in table.iter("tr")]
    assert rows == [["tokens trained", "loss"], ["0", "5.000"], ["1", "1.500"], ["2", "2.500"]]


def test_table_of_a_long_line_is_short_and_keeps_both_ends() -> None:
    lines = [Line("a", curve(range(1000), np.arange(1000.0))), Line("b", curve([500], [7.0])), Line("c", curve([1], [math.nan]))]
    rows = [[cell.text for cell in row] for row in parsed(line_table(Axes("nats"), lines)).iter("tr")]
    assert len(rows) <= 25 and rows[0] == ["tokens trained", "a", "b"]
    assert rows[1] == ["0", "0", "7.000"] and rows[-1][1] == "999.0"


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("on", 0.974, 0.941, 0.99, 0.02), Bar("off", 0.4), Bar("odd", 7.0, -3.0, math.nan, math.inf), Bar("none", math.nan)]
    rows = by_class(parsed(interval_bars("Accuracy", [("addition", bars)])), "row")
    first = rows[0]
    assert share(by_class(first, "fill")[0].get("width")) == 0.974
    whisker = by_class(first, "whisker")[0]
    assert (share(whisker.get("x1")), share(whisker.get("x2"))) == (0.941, 0.99)
    assert share(by_class(first, "baseline")[0].get("x1")) == 0.02
    assert "".join(by_class(first, "value")[0].itertext()).replace("\u202f", " ") == "97.4 % 94.1–99.0"
    assert not by_class(rows[1], "whisker") and not by_class(rows[1], "baseline")
    assert share(by_class(rows[2], "fill")[0].get("width")) == 1.0 and not by_class(rows[2], "whisker")
    assert not by_class(rows[3], "fill")


def test_changes_point_the_right_way() -> None:
    changes = [Change("prose", 2.0, 1.9), Change("code", 1.0, 1.02), Change("odd", 0.0, 1.0), Change("none", math.nan, 1.0)]
    root = parsed(change_bars("Merge", changes))
    rows = by_class(root, "row")
    zero = share(by_class(rows[0], "zero")[0].get("x1"))
    ticks = [(share(tick.get("x")), float((tick.text or "").replace("\u202f%", "").replace("−", "-"))) for tick in by_class(root, "tick")]
    (left, low), (right, high) = ticks[0], ticks[-1]
    for row, percent in ((rows[0], -5.0), (rows[1], 2.0)):
        fill = by_class(row, "fill")[0]
        start, width = share(fill.get("x")), share(fill.get("width"))
        end = start if percent < 0 else start + width
        assert math.isclose(low + (end - left) / (right - left) * (high - low), percent, abs_tol=0.05)
        assert math.isclose(start + width if percent < 0 else start, zero, abs_tol=2e-4)
    assert not by_class(rows[2], "fill") and not by_class(rows[3], "fill")


def test_lengths_are_proportional() -> None:
    rows = by_class(parsed(length_bars("Time", [("a", 10.0, "10 s"), ("b", 40.0, "40 s"), ("c", math.nan, "not done")])), "row")
    assert [share(by_class(row, "fill")[0].get("width")) for row in rows] == [0.25, 1.0, 0.0]


@pytest.mark.parametrize("ramp", [AROUND_ONE, VIOLATION])
def test_every_cell_has_the_colour_of_its_value(ramp) -> None:
    random = np.random.default_rng(1)
    values = np.exp(random.normal(0, 1.2, (7, 23))) - 0.01
    values[2, 3:6] = np.nan
    values[0, 0] = -5
    svg = by_class(parsed(heat_map("Load", values, Grid(tuple("abcdefg"), "expert", "x", whole=True), ramp)), "heat")[0]
    painted = np.full(values.shape, -1)
    for path in svg.iter("path"):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", path.get("d") or ""):
            cells = (int(y), slice(int(x), int(x) + int(width)))
            assert (painted[cells] == -1).all()
            painted[cells] = int((path.get("class") or "")[1:])
    wanted = np.where(np.isfinite(values), np.maximum(0, np.searchsorted(ramp.starts, values, side="right") - 1), -1)
    np.testing.assert_array_equal(painted, wanted)
    packed = [[math.nan if cell == "-" else float(cell) for cell in row.split(" ")] for row in (svg.get("data-values") or "").split(";")]
    np.testing.assert_allclose(packed, values, rtol=5e-3)


def test_heat_map_of_the_largest_model_is_small_and_its_labels_do_not_crowd() -> None:
    random = np.random.default_rng(2)
    values = np.exp(random.normal(0, 1, (80, 256)))
    picture = heat_map("Load", values, Grid(tuple(str(layer) for layer in range(80)), "expert", "x", whole=True), AROUND_ONE)
    assert len(picture) < 500_000
    svg = by_class(parsed(picture), "heat")[0]
    height = float(re.findall(r"\d+", svg.get("style") or "")[0])
    rows = [share(tick.get("y")) * height for tick in svg.iter("text") if tick.get("x") == "0"]
    assert np.diff(rows).min() >= 13.9
