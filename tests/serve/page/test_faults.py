"""What goes wrong, said in a sentence; and what a model may write."""

from __future__ import annotations

from typing import Any

import pytest

from .driving import ask, known, opened, plain, table_of, until
from .fake_server import HOSTILE, PAGE, Fake, serving


@pytest.mark.parametrize(("question", "sentence", "kept"), [
    ("please break", "The engine ran out of pages.", "The answer"),
    ("please drop", "The connection broke before the answer ended; the server may have stopped.", "The answer"),
    ("busy", "Too many requests wait; try again in 7 seconds.", ""),
    ("refuse", "temperature: 9 is above 2; give 0 to 2.", ""),
])
def test_failures_are_sentences(page: Any, question: str, sentence: str, kept: str) -> None:
    ask(page, question)
    assert page.inner_text(".answer .error") == sentence
    assert "not finished" in page.inner_text(".status") and plain(page, "content").startswith(kept)


def test_a_server_that_is_gone(browser: Any) -> None:
    with serving(Fake()) as fake:
        pages = opened(browser, fake)
        page = next(pages)
        known(page)
    ask(page, "Are you there?")
    assert page.inner_text(".answer .error") == "The server cannot be reached; is sparseling serve still running?"
    next(pages, None)


def test_a_key_is_asked_for(browser: Any) -> None:
    with serving(Fake(api_key="right")) as fake:
        pages = opened(browser, fake)
        page = next(pages)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.click("#key-form button[type=submit]")
        until(page, "document.getElementById('key').value === '' && document.getElementById('key-dialog').open")
        page.fill("#key", "right")
        page.press("#key", "Enter")
        known(page)
        ask(page, "What is 47 + 38?")
        assert plain(page, "content").startswith("The answer")
        fake.api_key = "changed"
        ask(page, "And now?")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "changed")
        page.press("#key", "Enter")
        until(page, "document.querySelectorAll('.answer').length === 2 && !document.querySelector('.answer .error:not([hidden])')"
              " && !document.querySelector('#send').hidden")
        assert plain(page, "content").startswith("The answer")
        assert page.evaluate("JSON.stringify({...localStorage})").find("changed") == -1  # a key does not outlive its tab
        next(pages, None)


def test_what_the_model_writes_is_text(page: Any) -> None:
    page.evaluate("addEventListener('securitypolicyviolation', () => { document.title = 'violated'; })")
    title = page.title()
    ask(page, "something hostile", thinking=True)
    whole = b"".join(token.encode() if isinstance(token, str) else token for token in HOSTILE).decode()
    assert plain(page, "content") == whole.replace("\u202e", "[U+202E]")  # a mark that would turn the rest around is named
    assert page.locator(".answer").locator("img, script, b, a, iframe").count() == 0
    assert page.title() == title
    page.get_by_text("<img src=x", exact=True).last.click()
    assert page.inner_text(".token-title") == "“<img src=x”"
    page.click("#tab-map")
    page.select_option("#map-kind", "0")
    page.click("#map-view details summary")
    assert any("<script>" in row[0] for row in table_of(page, "#map-view"))
    assert page.title() == title and page.locator("aside script, aside img").count() == 0


def test_the_page_asks_nobody_else_and_obeys_its_own_policy(page: Any, fake: Fake) -> None:
    hosts: set[str] = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    page.reload()
    known(page)
    assert hosts == {fake.url.removeprefix("http://")}
    policy = page.get_attribute("meta[http-equiv=Content-Security-Policy]", "content")
    assert "default-src 'self'" in policy and "unsafe" not in policy
    assert page.locator("[style]:not(.token)").evaluate_all("nodes => nodes.length") == 0
    loaded = {path.removeprefix("/page/") for path in fake.paths if path.startswith("/page/")}
    assert loaded >= {path.name for path in PAGE.iterdir()} - {"index.html", "icon.svg"}
