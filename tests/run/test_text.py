"""Stop strings against their definition: the answer ends where the earliest stop string begins, however its letters came."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseling.data.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from sparseling.run.text import AnswerText


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["abab cabba ünï ababc\n\nabcabc"] * 30, 300, Path(tmp_path_factory.mktemp("tokenizer")))


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: read letter by letter until some stop string stands at the end; cut where the longest of those begins."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[:min(starts)], True
    return text, False


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("abcü", max_size=24), st.lists(st.text("abcü", min_size=1, max_size=4), max_size=3), st.integers(0, 10**6))
def test_text_is_cut_where_the_definition_says_at_any_token_boundary(tokenizer: Tokenizer, text: str, stops: list[str], seed: int) -> None:
    rng, data, ids = random.Random(seed), text.encode(), []
    while data:                                                  # any tokens that spell the text, not only the canonical ones
        fitting = [token for token in range(tokenizer.vocab_size)
                   if (spelled := tokenizer.bytes_of(token)) and data.startswith(spelled)]
        ids.append(rng.choice(fitting))
        data = data[len(tokenizer.bytes_of(ids[-1])):]
    answer, decoder, shown = AnswerText(stops), StreamDecoder(tokenizer), ""
    want, stopped = expected(text, stops)
    for token in ids:
        shown += answer.take(decoder.push(token))
        assert want.startswith(shown)
    shown += answer.finish()
    assert shown == want and answer.stopped == stopped


def test_nothing_is_held_back_without_need() -> None:
    answer = AnswerText(["abc"])
    assert [answer.take(letter) for letter in "xax"] == ["x", "", "ax"]
    assert [AnswerText().take("ab"), AnswerText(["b", ""]).take("ac")] == ["ab", "ac"]
