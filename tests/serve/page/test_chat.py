"""The chat of the page in a real headless Chromium, against the fake server beside this file."""

from __future__ import annotations

from typing import Any

from .driving import ENDED, ask, known, plain, until
from .fake_server import Fake


def test_an_answer_streams_in(page: Any, fake: Fake) -> None:
    fake.delay_s = 0.03
    ask(page, "What is 47 + 38?", thinking=True, wait=False)
    until(page, "document.querySelectorAll('.reasoning .token').length > 3")
    assert page.locator("#stop").is_visible() and page.locator(".content").is_hidden()
    page.wait_for_selector(ENDED)
    assert plain(page, "content") == "The answer is 85. I am quite sure of it."
    assert plain(page, "reasoning") == "7 plus 8 is 15, carry 1; 4 plus 3 plus 1 is 8."
    assert "37 tokens" in page.inner_text(".status") and page.locator("#send").is_visible()
    request = fake.requests[0]
    assert request["routing"] is True and request["stream"] is True and request["chat_template_kwargs"] == {"enable_thinking": True}
    assert "temperature" not in request  # an empty field leaves the server's own
    page.click(".reasoning summary")
    assert page.locator(".reasoning-tokens").is_hidden()


def test_what_is_shown_is_the_text_whole(page: Any) -> None:
    ask(page, "What is 47 + 38?", thinking=True)
    shown = page.locator(".content-tokens .token:not(.silent)").evaluate_all("tokens => tokens.map(token => token.textContent)")
    assert shown == ["The", " answer", " is", " ", "8", "5", ".", " I", " am", " quite", " sure", " of", " it", "."]


def test_stop_ends_the_request(page: Any, fake: Fake) -> None:
    fake.delay_s = 0.01
    ask(page, "a slow one", wait=False)
    until(page, "document.querySelectorAll('.token').length > 5")
    page.click("#stop")
    page.wait_for_selector(ENDED)
    assert "stopped" in page.inner_text(".status") and plain(page, "content").startswith(" and 0 and 1")
    assert fake.aborted.wait(5)
    assert page.evaluate("document.activeElement.id") == "question"


def test_turns_go_along_unless_each_question_stands_alone(page: Any, fake: Fake) -> None:
    ask(page, "What is 47 + 38?")
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#seed", "7")
    page.fill("#temperature", "0.5")
    page.press("#seed", "Enter")
    ask(page, "And 1 + 1?")
    request = fake.requests[1]
    assert [message["role"] for message in request["messages"]] == ["system", "user", "assistant", "user"]
    assert request["messages"][2]["content"] == "The answer is 85. I am quite sure of it."
    assert request["seed"] == 7 and request["temperature"] == 0.5
    page.reload()
    page.click("#open-settings")
    assert page.input_value("#seed") == "7"
    page.check("#alone")
    page.click("#settings button[type=submit]")
    ask(page, "One?")
    ask(page, "Two?")
    assert fake.requests[-1]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]


def test_a_setting_that_cannot_be_used_is_named(page: Any, fake: Fake) -> None:
    known(page)
    page.click("#open-settings")
    page.fill("#top-p", "3")
    page.evaluate("document.getElementById('settings-dialog').close()")
    page.fill("#question", "What?")
    page.press("#question", "Enter")
    assert page.inner_text("#ask-error") == "Top p: give a number from 0 to 1, or nothing."
    assert fake.requests == [] and page.input_value("#question") == "What?"


def test_regenerate_and_new_chat(page: Any, fake: Fake) -> None:
    ask(page, "What is 47 + 38?", thinking=True)
    page.click("#thinking")  # the answer is made again as it was asked for
    page.click("text=Regenerate")
    until(page, "document.querySelectorAll('.answer').length === 1 && !document.querySelector('#send').hidden")
    assert len(fake.requests) == 2 and fake.requests[0] == fake.requests[1]
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    fake.delay_s = 0.01
    ask(page, "a slow one", wait=False)
    page.wait_for_selector(".token")
    page.click("#new-chat")  # in the middle of an answer
    page.wait_for_selector("#send:not([hidden])")
    assert page.locator("#stop").is_hidden() and page.locator(".answer").count() == 0
    ask(page, "again")
    assert len(fake.requests[3]["messages"]) == 1
