"""Heat maps, load and two answers side by side: every number is what the server sent."""

from __future__ import annotations

from typing import Any

import pytest

from .driving import CELLS, ask, counts_of, known, opened, table_of, until
from .fake_server import Fake


def test_the_heat_map_is_what_the_server_sent(page: Any, fake: Fake) -> None:
    ask(page, "What is 47 + 38?", thinking=True)
    page.click(".answer >> text=Experts")
    page.click("#map-view details summary")
    counts = counts_of(fake.sent[0], fake.shape)
    assert table_of(page, "#map-view") == [[f"Layer {layer}", *map(str, counts[layer])] for layer in fake.shape.layers]
    page.select_option("#map-measure", "weight")
    for row, layer in zip(table_of(page, "#map-view"), fake.shape.layers, strict=True):
        sums = [0.0] * fake.shape.experts
        for entry in fake.sent[0]:
            for routed in entry["layers"]:
                for expert, weight in zip(routed["experts"], routed["weights"], strict=True):
                    sums[expert] += weight * (routed["layer"] == layer)
        assert [float(cell) for cell in row[1:]] == pytest.approx([100 * value / sum(sums) for value in sums], abs=0.011)
    page.select_option("#map-kind", "1")  # the second layer, token by token
    for number, (name, cell) in enumerate(table_of(page, "#map-view")):
        routed = fake.sent[0][number]["layers"][1]
        assert name.startswith(f"{number + 1} ")
        assert {int(part.split()[0]) for part in cell.split(", ")} == set(routed["experts"])


def test_the_colours_of_the_map_follow_its_values(page: Any, fake: Fake) -> None:
    ask(page, "What is 47 + 38?", thinking=True)
    page.click(".answer >> text=Experts")
    pixels = page.locator("#map-view .plot canvas").evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]")
    counts = counts_of(fake.sent[0], fake.shape)
    flat = [count for layer in fake.shape.layers for count in counts[layer]]
    assert len(pixels) == 4 * len(flat)
    luminance = [0.2126 * pixels[4 * at] + 0.7152 * pixels[4 * at + 1] + 0.0722 * pixels[4 * at + 2] for at in range(len(flat))]
    by_count: dict[int, set[float]] = {}
    for count, light in zip(flat, luminance, strict=True):
        by_count.setdefault(count, set()).add(light)
    assert all(len(lights) == 1 for lights in by_count.values())
    ordered = [next(iter(by_count[count])) for count in sorted(by_count)]
    assert ordered == sorted(ordered, reverse=True) and len(set(ordered)) == len(ordered)  # on light paper more is darker


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_ramp_is_ordered_by_lightness_alone(browser: Any, fake: Fake, scheme: str) -> None:
    pages = opened(browser, fake, color_scheme=scheme)
    page = next(pages)
    colours = page.evaluate("import('/page/palette.js').then(({ oneWay }) => Array.from({ length: 64 }, (_, step) => oneWay(step / 63)))")

    def linear(value: int) -> float:
        return value / 255 / 12.92 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4

    luminance = [0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) for r, g, b in colours]
    assert luminance == sorted(luminance, reverse=scheme == "light")
    assert (max(luminance) + 0.05) / (min(luminance) + 0.05) > 7
    next(pages, None)


def test_a_cell_marks_its_tokens(page: Any, fake: Fake) -> None:
    ask(page, "What is 47 + 38?", thinking=True)
    page.click(".answer >> text=Experts")
    counts = counts_of(fake.sent[0], fake.shape)[1]
    expert = counts.index(max(counts))
    box = page.locator("#map-view .plot canvas").bounding_box()
    page.mouse.click(box["x"] + (expert + 0.5) * box["width"] / fake.shape.experts, box["y"] + 5)
    assert page.locator(".token.tinted").count() == counts[expert]
    assert page.inner_text("#marked-text") == f"Marked: {counts[expert]} of 37 tokens used expert {expert} of layer 1"
    page.click("#unmark")
    assert page.locator(".token.tinted").count() == 0


def test_load_beside_the_server(page: Any, fake: Fake) -> None:
    ask(page, "What is 47 + 38?", thinking=True)
    page.click(".answer >> text=Experts")
    page.click("#tab-load")
    page.wait_for_selector("#load-view table")
    load = page.evaluate("fetch('/v1/experts/load').then((reply) => reply.json())")
    counts = counts_of(fake.sent[0], fake.shape)
    rows = page.locator("#load-view tbody tr").evaluate_all(CELLS)
    for row, layer in zip(rows, load["layers"], strict=True):
        mine, other = counts[layer["layer"]], layer["counts"]
        distance = sum(abs(a / sum(mine) - b / sum(other)) for a, b in zip(mine, other, strict=True)) / 2
        assert row[1] == f"{sum(count > 0 for count in mine)} of 16"
        assert row[2] == f"{mine.index(max(mine))} ({max(mine) * 16 / sum(mine):.1f}×)"
        assert float(row[4].rstrip("%")) == pytest.approx(100 * distance, abs=0.51)


def test_side_by_side(page: Any, fake: Fake) -> None:
    fake.delay_s = 0.02
    known(page)
    page.click("#side-by-side")
    ask(page, "What is 47 + 38?", wait=False)
    until(page, "[...document.querySelectorAll('.answer')].filter(one => one.querySelector('.token')).length === 2")
    assert page.locator("#stop").is_visible()  # both stream at once
    page.wait_for_selector("#send:not([hidden])")
    modes = [request["chat_template_kwargs"]["enable_thinking"] for request in fake.requests]
    assert sorted(modes) == [False, True]
    on, off = (counts_of(fake.sent[modes.index(mode)], fake.shape) for mode in (True, False))
    page.wait_for_timeout(700)  # the comparison is drawn at most twice a second
    rows = page.locator(".comparison > .table-scroller tbody tr").evaluate_all(CELLS)
    cells = [(layer, expert) for layer in fake.shape.layers for expert in range(16)]
    differences = sorted((abs(on[layer][expert] / 37 - off[layer][expert] / 14) for layer, expert in cells), reverse=True)
    for row, difference in zip(rows, differences, strict=False):
        layer, expert = (int(part.split()[-1]) for part in row[0].split(","))
        assert row[1:3] == [f"{100 * on[layer][expert] / 37:.1f}%", f"{100 * off[layer][expert] / 14:.1f}%"]
        assert abs(on[layer][expert] / 37 - off[layer][expert] / 14) == pytest.approx(difference)
    assert len(rows) == 12 and page.locator(".comparison .heat-map").count() == 3
    page.locator(".comparison > .table-scroller tbody button").first.click()
    assert page.locator(".token.tinted").count() > 0
    page.get_by_role("button", name="Go on from this one").nth(1).click()
    page.click("#side-by-side")
    ask(page, "And then?")
    assert len(fake.requests[2]["messages"]) == 3
