"""What the tests of the page do in it: open it, ask, read its tables."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

from .fake_server import Fake, Shape

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
ENDED = ".actions:not([hidden])"
# The browser's own words on refusals
EXPECTED = ("Failed to load resource: the server responded with a status of 4", "net::ERR_CONNECTION")
CELLS = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"


def opened(browser: Any, fake: Fake, **options: Any) -> Iterator[Any]:
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(10_000)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(fake.url)
    yield page
    context.close()
    assert [trouble for trouble in troubles if not any(part in trouble for part in EXPECTED)] == []


def until(page: Any, condition: str) -> None:
    """Waits for a condition in JavaScript. (`page.wait_for_function` evaluates strings in the page, which its policy forbids.)"""
    deadline = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, condition
        page.wait_for_timeout(20)


def known(page: Any) -> None:
    page.wait_for_selector("#model-name:not(:empty)")


def ask(page: Any, question: str, thinking: bool | None = None, wait: bool = True) -> None:
    known(page)
    if thinking is not None and page.get_attribute("#thinking", "aria-checked") != str(thinking).lower():
        page.click("#thinking")
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector("#send:not([hidden])", timeout=60_000)


def plain(page: Any, part: str) -> str:
    return page.locator(f".{part} .plain-text").last.evaluate("node => node.textContent")


def table_of(page: Any, root: str) -> list[list[str]]:
    page.wait_for_selector(f"{root} details[open] table")
    return page.locator(f"{root} details table tbody tr").evaluate_all(CELLS)


def counts_of(entries: list[dict[str, Any]], shape: Shape) -> dict[int, list[int]]:
    counts = {layer: [0] * shape.experts for layer in shape.layers}
    for entry in entries:
        for routed in entry["layers"]:
            for expert in routed["experts"]:
                counts[routed["layer"]][expert] += 1
    return counts
