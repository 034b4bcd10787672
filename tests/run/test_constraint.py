"""Constraints: every text that comes out keeps to the grammar, whatever the model would like to say."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest

from sparseling.data.tokenizer import Tokenizer, train_tokenizer
from sparseling.errors import UserError
from sparseling.run.constraint import Grammar, Vocabulary, json_rule, regex_rule

pytest.importorskip("llguidance")
SIZE = 400  # rows of the model, more than tokens
SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": -5, "maximum": 40},
                                     "kind": {"enum": ["ä", "b"]}},
    "required": ["name", "n", "kind"], "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ['{"name": "Größe", "n": 12} <think> thinking </think>\n\n{"kind": "ä"} abc 123'] * 20
    return train_tokenizer(texts, 340, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer, SIZE, (tokenizer.eos_id, tokenizer.end_of_text_id))


def wander(grammar: Grammar, tokenizer: Tokenizer, seed: int, close_after: int = 60) -> str:
    """A random walk through what is allowed, which stops when it can after a while."""
    rng = random.Random(seed)
    ids: list[int] = []
    for step in range(400):
        allowed = np.flatnonzero(grammar.allowed()).tolist()
        assert allowed
        stops = [token for token in allowed if token in (tokenizer.eos_id, tokenizer.end_of_text_id)]
        if stops and (step > close_after or len(stops) == len(allowed) or rng.random() < 0.1):
            return tokenizer.decode(ids)
        closing = [token for token in allowed if step > close_after and tokenizer.bytes_of(token) in (b"<", b"</", b'"', b"}")]
        ids.append(rng.choice(closing or [token for token in allowed if token not in stops]))
        grammar.push(ids[-1])
    raise AssertionError(f"no end: {tokenizer.decode(ids)}")


def test_json_keeps_to_its_schema(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    texts = [wander(Grammar(vocabulary, json_rule(SCHEMA)), tokenizer, seed) for seed in range(30)]
    assert len(set(texts)) > 20
    for text in texts:
        value = json.loads(text)
        assert list(value) == ["name", "n", "kind"] and -5 <= value["n"] <= 40 and value["kind"] in ("ä", "b") and len(value["name"]) <= 8


@pytest.mark.parametrize("regex", [r"[a-f]{3,5}(-[0-9]+)?", r"(yes|no|Größe/Maß)", r"\d{4}/\d\d", "a\nb|c"])
def test_a_regular_expression_matches_the_whole_answer(vocabulary: Vocabulary, tokenizer: Tokenizer, regex: str) -> None:
    for seed in range(10):
        assert re.fullmatch(regex, wander(Grammar(vocabulary, regex_rule(regex)), tokenizer, seed, 10))


def test_with_thinking_only_what_follows_the_thought_is_constrained(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    rule = regex_rule("[0-9]{2}")
    for text, fits in (("\n<think>\nanything {]: </thin \n</think>\n\n47", True), ("<think></think>47", True), ("<think>a</think>x", False),
                       ("47", False), ("\n<think>\n47", True)):
        grammar, good = Grammar(vocabulary, rule, thinking=True), True
        for token in tokenizer.encode(text):
            good = good and bool(grammar.allowed()[token])
            if good:
                grammar.push(token)
        assert good == fits, text
        if good:
            assert bool(grammar.allowed()[tokenizer.eos_id]) == text.endswith(">\n\n47") or text == "<think></think>47"
        else:
            assert not grammar.allowed()[tokenizer.eos_id]


def test_special_tokens_and_rows_without_a_token_are_never_allowed(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    allowed = Grammar(vocabulary, regex_rule("(?s:.*)")).allowed()
    assert allowed.shape == (SIZE,) and not allowed[tokenizer.vocab_size:].any()
    assert {int(token) for token in np.flatnonzero(allowed)} & tokenizer.special_ids == {tokenizer.eos_id, tokenizer.end_of_text_id}


@pytest.mark.parametrize("rule", [
    lambda: regex_rule("("), lambda: regex_rule("(?=a)"), lambda: json_rule({"type": "nothing"}), lambda: json_rule(False), lambda: "((",
    lambda: json_rule({"enum": ["x" * 300_000]}), lambda: json_rule({"$ref": "#/$defs/missing"}),
])
def test_what_is_no_grammar_is_refused_in_a_sentence(vocabulary: Vocabulary, rule: object) -> None:
    with pytest.raises(UserError, match=r"^constraint: .*; ") as raised:
        Grammar(vocabulary, rule())  # type: ignore[operator]
    assert "\n" not in str(raised.value)
