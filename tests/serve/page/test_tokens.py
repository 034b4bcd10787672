"""A token and its experts, by mouse and by keyboard."""

from __future__ import annotations

from typing import Any

import pytest

from .driving import CELLS, ENDED, ask, counts_of, known, until
from .fake_server import Fake


def test_a_token_shows_its_experts(page: Any, fake: Fake) -> None:
    ask(page, "What is 47 + 38?", thinking=True)
    page.locator(".content-tokens .token", has_text="quite").click()
    entry = next(entry for entry in fake.sent[0] if entry["text"] == " quite")
    place = fake.sent[0].index(entry)
    assert page.inner_text(".token-title") == "“␣quite”"
    assert f"Token {place + 1} of 37, id {entry['token']}" in page.inner_text("#token-view")
    page.click("text=Open or close all layers")
    until(page, "document.querySelectorAll('.layer table').length === 3")
    for number, routed in enumerate(entry["layers"]):
        layer = page.locator(".layer").nth(number)
        assert f"Layer {routed['layer']}" in layer.inner_text()
        assert f"Groups kept: {', '.join(map(str, routed['groups']))}" in layer.inner_text()
        shown = layer.locator("tbody tr").evaluate_all(CELLS)
        sent = sorted(zip(*(routed[key] for key in ("experts", "weights", "scores", "biased")), strict=True), key=lambda row: -row[1])
        for cells, (expert, *numbers) in zip(shown, sent, strict=True):
            assert cells[0] == f"Expert {expert}"
            assert [float(cell.replace("−", "-")) for cell in cells[1:]] == pytest.approx([*numbers, numbers[2] - numbers[1]], abs=1.01e-4)
    page.click("#next-token")
    assert page.inner_text(".token-title") == "“␣sure”"
    page.click("#panel-close")
    assert page.locator("#panel").is_hidden()


def test_a_token_that_was_never_read_says_so(page: Any) -> None:
    ask(page, "a cut one")
    assert "cut off" in page.inner_text(".status")
    page.locator(".content-tokens .token").last.click()
    assert "never read" in page.inner_text("#token-view")


def test_by_keyboard_alone(page: Any, fake: Fake) -> None:
    known(page)
    page.keyboard.type("What is 47 + 38?")  # the question has the focus from the start
    page.keyboard.press("Enter")
    page.wait_for_selector(ENDED)
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.classList.contains('token')"):
            break
    assert page.evaluate("document.activeElement.textContent") == "The"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.inner_text(".token-title") == "“␣answer”"
    assert page.evaluate("document.activeElement.textContent") == " answer"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("End")  # the open panel follows
    assert page.inner_text(".token-title") == "“.”"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # a second time: into the panel
    assert page.evaluate("document.activeElement.id") == "panel-title"
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "tab-token":
            break
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-map" and page.locator("#map-tab").is_visible()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('plot')"):
            break
    counts = counts_of(fake.sent[0], fake.shape)
    for _ in range(2):
        page.keyboard.press("ArrowDown")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.inner_text("#map-view .reading").startswith(f"Layer 3, expert 3: {counts[3][3]} of 14 tokens")
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")  # no further than the edge
    assert page.inner_text("#map-view .reading").startswith(f"Layer 3, expert 15: {counts[3][15]} of 14 tokens")
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden() and page.evaluate("document.activeElement.textContent") == "The"
