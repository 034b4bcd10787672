"""On a phone, with a screen reader, without motion, and with much of everything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .driving import ask, known, opened
from .fake_server import Fake, Shape, serving

AXE = Path(__file__).parents[3] / "node_modules" / "axe-core" / "axe.min.js"


def test_a_phone_never_scrolls_sideways(browser: Any, fake: Fake) -> None:
    pages = opened(browser, fake, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = next(pages)

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= 360 && document.getElementById('conversation').scrollWidth <= 360")

    known(page)
    assert fits()
    ask(page, "hostile " + "w" * 200, thinking=True)
    assert fits()
    page.locator(".content-tokens .token").nth(4).tap()
    token, panel = page.locator(".token[aria-selected=true]").bounding_box(), page.locator("#panel").bounding_box()
    assert panel["width"] == 360 and token["y"] + token["height"] <= panel["y"] + 1  # the sheet leaves its token in view
    for tab in ("#tab-map", "#tab-load", "#tab-token"):
        page.tap(tab)
        assert fits()
        assert page.evaluate("[...document.querySelectorAll('.tab')].every(tab => tab.scrollWidth <= tab.clientWidth)")
    page.tap("#panel-close")
    page.tap("#side-by-side")
    ask(page, "What is 47 + 38?")
    page.wait_for_selector(".comparison tbody tr")
    assert fits()
    page.tap("#open-settings")
    assert fits() and page.evaluate("(dialog => dialog.scrollWidth <= dialog.clientWidth)(document.getElementById('settings-dialog'))")
    next(pages, None)


def names_missing(page: Any) -> list[str]:
    """Controls in the accessibility tree that have no name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = ["button", "textbox", "combobox", "checkbox", "switch", "tab", "tabpanel", "option", "listbox", "spinbutton", "dialog",
             "application", "image", "link", "complementary", "article", "region"]
    return [node["role"]["value"] for node in nodes
            if not node["ignored"] and node.get("role", {}).get("value") in roles and not node.get("name", {}).get("value", "").strip()]


def states(page: Any) -> Iterator[str]:
    """The page in every state that a reader meets."""
    known(page)
    yield "welcome"
    ask(page, "hostile", thinking=True)
    yield "answer"
    page.locator(".content-tokens .token").nth(4).click()
    page.click("text=Open or close all layers")
    yield "token"
    page.click("#tab-map")
    page.click("#map-view details summary")
    yield "map"
    page.click("#tab-load")
    page.wait_for_selector("#load-view table")
    yield "load"
    page.click("#side-by-side")
    ask(page, "What is 47 + 38?")
    page.wait_for_selector(".comparison tbody tr")
    yield "side by side"
    page.click("#open-settings")
    yield "settings"


def test_every_control_has_a_name(page: Any) -> None:
    for state in states(page):
        assert names_missing(page) == [], state
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
        assert len(ids) == len(set(ids)), state


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: npm install --no-save axe-core")
def test_axe_finds_nothing(browser: Any, fake: Fake, scheme: str) -> None:
    pages = opened(browser, fake, color_scheme=scheme)
    page = next(pages)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for state in states(page):
        found = page.evaluate("axe.run().then(({ violations }) => violations.map(({ id, nodes }) => [id, nodes.map((one) => one.html)]))")
        assert found == [], (state, json.dumps(found, indent=1))
    next(pages, None)


def test_the_live_region_is_not_chatty(page: Any, fake: Fake) -> None:
    known(page)
    page.evaluate("""() => { window.said = []; new MutationObserver(() => window.said.push(document.getElementById('live').textContent))
        .observe(document.getElementById('live'), { childList: true, characterData: true, subtree: true }); }""")
    fake.delay_s = 0.01
    ask(page, "What is 47 + 38?", thinking=True)
    assert page.evaluate("window.said") == ["Answering.", "The answer is 85. I am quite sure of it."]
    assert page.locator(".answer [aria-live]:not([aria-live=off]), .answer [role=log]").count() == 0


def test_no_motion_where_none_is_wanted(browser: Any, fake: Fake) -> None:
    pages = opened(browser, fake, reduced_motion="reduce")
    page = next(pages)
    assert page.evaluate("[...document.querySelectorAll('*')].every(node => ['', '::before', '::after'].every(part => "
                         "parseFloat(getComputedStyle(node, part).transitionDuration) === 0))")
    next(pages, None)


def test_a_large_model_and_a_long_answer_do_not_freeze_it(browser: Any) -> None:
    with serving(Fake(shape=Shape(layers=tuple(range(1, 21)), experts=256, per_token=8, groups=8, kept_groups=4))) as fake:
        pages = opened(browser, fake)
        page = next(pages)
        known(page)
        page.evaluate("""() => { window.longest = 0; let last = performance.now();
            const tick = (now) => {
                window.longest = Math.max(window.longest, now - last);
                last = now;
                requestAnimationFrame(tick);
            };
            requestAnimationFrame(tick); }""")
        ask(page, "long 2000", wait=False)
        page.wait_for_selector(".token")
        page.locator(".content-tokens .token").first.click()
        page.click("#tab-map")  # drawn anew while the answer comes
        page.wait_for_selector("#send:not([hidden])", timeout=60_000)
        assert page.locator(".token").count() == 2000 == len(fake.sent[0])
        page.select_option("#map-kind", "19")
        page.locator("#map-view .plot").focus()
        for _ in range(20):
            page.keyboard.press("ArrowDown")
        assert page.inner_text("#map-view .reading").startswith("Token 21 ")
        page.keyboard.press("Enter")
        page.locator(".token[aria-selected=true]").focus()
        for _ in range(20):
            page.keyboard.press("ArrowRight")
        assert "Token 41 of 2000" in page.inner_text("#token-view")
        assert page.evaluate("window.longest") < 1000  # milliseconds between two frames; some 100 on an idle machine
        next(pages, None)
