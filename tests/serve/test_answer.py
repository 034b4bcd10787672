"""From tokens to a reply: any grouping of steps gives the same, parts are those of the text, and nothing is told of what is withheld."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sparseling.align.chat import parse_response
from sparseling.data.tokenizer import Tokenizer
from sparseling.run.job import Progress, RoutingRows
from sparseling.run.sampler import GREEDY
from sparseling.serve.answer import Answer, Delta
from sparseling.serve.plan import Plan
from sparseling.serve.routing import RoutingView

TEXTS = ["\n<think>\nHow many? ünï\n</think>\n\nTwelve 数", "plain answer", "<think>never closed", "", "<thin", "<think></think>x",
         "\n\n<think>a\n</think>\n\n\nb\n"]


class NoExperts(RoutingView):
    """A view of a model with one MoE layer of two experts in one group."""

    def __init__(self) -> None:
        self.layers, self.groups, self.groups_kept, self.bias = [1], 1, 1, np.array([[0.5, 0.0]], dtype=np.float32)


def progress(token: int | None, finish: str | None, place: int) -> Progress:
    rows = RoutingRows(place, np.array([[[1]]], np.int32), np.ones((1, 1, 1), np.float32), np.array([[[0.25, 0.125]]], np.float32))
    return Progress(None, token, finish, -1.5 if token is not None else None, (), rows if place >= 0 else None)  # type: ignore[arg-type]


def run(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = (), finish: str = "stop") -> tuple[Answer, Delta, list[Delta]]:
    plan = Plan([5, 6, 7], 100, GREEDY, (), stops, top_logprobs=0)
    answer, all_of_it, deltas = Answer(plan, tokenizer, True, True, NoExperts(), 3), Delta(), []
    ends = ["length" if finish == "length" and n == len(ids) - 1 else None for n in range(len(ids))]
    steps = [progress(token, ends[n], n + 2 if n else -1) for n, token in enumerate(ids)]
    for step in steps + ([progress(None, "stop", len(ids) + 2)] if finish == "stop" else []):
        if answer.finish is None:
            deltas.append(answer.push(step))
            all_of_it.add(deltas[-1])
    return answer, all_of_it, deltas


@pytest.mark.parametrize("text", TEXTS)
def test_a_reply_is_what_the_whole_text_says(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    answer, reply, deltas = run(tokenizer, ids)
    reasoning, content = parse_response(text)
    if text == "<thin":
        reasoning, content = None, text
    assert (reply.reasoning, reply.content.rstrip("\n")) == (reasoning or "", content.rstrip("\n")) and answer.finish == "stop"
    assert [entry["bytes"] for entry in reply.logprobs] == [list(tokenizer.bytes_of(token)) for token in ids]
    assert [(entry["index"], entry["token"]) for entry in reply.routing] == [(n + 3, token) for n, token in enumerate(ids)]
    assert reply.routing == [] or reply.routing[0]["layers"] == [
        {"layer": 1, "experts": [1], "weights": [1.0], "scores": [0.125], "biased": [0.125], "groups": [0]}]
    shown = tokenizer.decode([entry["token"] for entry in reply.routing if entry["part"] == "content"])
    assert shown.strip("\n") == reply.content.strip("\n")
    assert answer.reasoning_tokens == sum(entry["part"] == "reasoning" for entry in reply.routing)
    assert len(deltas) == len(ids) + 1


@pytest.mark.parametrize("stop", ["many", "ünï", "</think>", "Tw", "elve 数", "?", "nowhere"])
def test_nothing_of_a_stop_string_or_after_it_is_told(tokenizer: Tokenizer, stop: str) -> None:
    text = TEXTS[0]
    _, reply, _ = run(tokenizer, tokenizer.encode(text), (stop,))
    said = text.partition(stop)[0]
    told = b"".join(bytes(entry["bytes"]) for entry in reply.logprobs).decode("utf-8", "ignore")
    assert said.startswith(told) and len(said) - len(told) <= 12
    reasoning, content = parse_response(said)
    assert (reply.reasoning, reply.content.rstrip("\n")) == (reasoning or "", content.rstrip("\n"))
    answer, _, _ = run(tokenizer, tokenizer.encode(text), (stop,))
    assert answer.stopped == (stop != "nowhere") and answer.finish == "stop"


def test_calls_end_an_answer_as_calls_and_a_full_answer_as_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode('<think>\nI look\n<tool_call>\n{"name": "f", "arguments": {"ü": 1}}\n</tool_call>')
    answer, reply, _ = run(tokenizer, ids)
    assert answer.finish == "tool_calls" and reply.reasoning == "I look" and reply.calls == [("f", '{"ü": 1}')] and reply.content == ""
    answer, reply, _ = run(tokenizer, tokenizer.encode("abc"), finish="length")
    assert answer.finish == "length" and reply.content == "abc"
    answer, reply, _ = run(tokenizer, tokenizer.encode('<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"na'), finish="length")
    assert answer.finish == "length" and reply.calls == [("f", "{}")] and reply.content == '<tool_call>{"na'


def test_any_tokens_at_all_end_in_valid_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(100):
        ids = [rng.randrange(420) for _ in range(30)]
        _, reply, _ = run(tokenizer, ids, ("ab",))
        (reply.reasoning + reply.content).encode()
        assert len(reply.logprobs) <= 30
