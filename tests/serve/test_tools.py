"""Tool calls in a growing text: what is found does not depend on how the text was cut, and nothing else is lost."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseling.run.thinking import ThinkingSplitter
from sparseling.serve.tools import Call, ToolSplitter, calls_rule, parse_calls


def found(pieces: list[str]) -> tuple[str, list[Call], str]:
    """(thought, calls, answer) of a text that came in these pieces, as the server splits it."""
    tools, thinking = ToolSplitter(), ThinkingSplitter()
    calls: list[Call] = []
    texts = {"thought": "", "answer": ""}
    for piece in [item for part in pieces for item in tools.push(part)] + tools.finish():
        if isinstance(piece, Call):
            calls.append(piece)
            continue
        for kind, text in thinking.push(piece):
            texts[kind] += text
    for kind, text in thinking.finish():
        texts[kind] += text
    return texts["thought"], calls, texts["answer"]


def block(*calls: dict[str, object]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)


PIECES = ["<tool_call>", "</tool_call>", "<think>", "</think>", "\n", '{"name": "f"}', '"', "\\", "a", "ü", "{", "<"]
WEATHER = {"name": "weather", "arguments": {"city": "Köln", "days": 3, "units": {"t": "°C"}, "tags": ["a", "b"], "note": None}}
TIME = {"name": "time", "arguments": {}}
CASES = {
    "one": (block(WEATHER), "", [WEATHER], ""),
    "several": (block(WEATHER, TIME, WEATHER), "", [WEATHER, TIME, WEATHER], ""),
    "text around": ("Let me see.\n" + block(TIME) + "\nDone.", "", [TIME], "Let me see.\nDone."),
    "after a thought": ("\n<think>\nI should look.\n</think>\n\n" + block(WEATHER), "I should look.", [WEATHER], ""),
    "in a thought that never closes": ("<think>\nI look:\n" + block(WEATHER, TIME), "I look:", [WEATHER, TIME], ""),
    "in a thought that closes later": ("<think>hm " + block(TIME) + "\nso\n</think>\n\nIt is late.", "hm \nso", [TIME], "It is late."),
    "tag within an argument": (block({"name": "f", "arguments": {"x": 'a </tool_call> "b" <tool_call> \\'}}), "",
                               [{"name": "f", "arguments": {"x": 'a </tool_call> "b" <tool_call> \\'}}], ""),
    "malformed": ("<tool_call>\n{\"name\": \"f\", arguments}\n</tool_call>", "", [],
                  "<tool_call>\n{\"name\": \"f\", arguments}\n</tool_call>"),
    "malformed, then good": ("<tool_call>{nothing}</tool_call>\n" + block(TIME), "", [TIME], "<tool_call>{nothing}</tool_call>"),
    "unclosed string, then good": ('<tool_call>{"name": "f}</tool_call>\n' + block(TIME), "", [TIME],
                                   '<tool_call>{"name": "f}</tool_call>'),
    "end missing": ('<tool_call>\n{"name": "time", "arguments": {}}', "", [TIME], ""),
    "cut off": ('<tool_call>\n{"name": "time", "argum', "", [], '<tool_call>\n{"name": "time", "argum'),
    "arguments as text": ('<tool_call>{"name": "f", "arguments": "{\\"ä\\": 1}"}</tool_call>', "",
                          [{"name": "f", "arguments": {"ä": 1}}], ""),
    "a list": ('<tool_call>[{"name": "f"}, {"name": "g", "arguments": null}]</tool_call>', "",
               [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}], ""),
    "two in a block": ('<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>', "", [{"name": "f", "arguments": {}},
                                                                                  {"name": "g", "arguments": {}}], ""),
    "not a number": ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "", [],
                     '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>'),
    "empty": ("<tool_call></tool_call>", "", [], "<tool_call></tool_call>"),
    "no object": ("<tool_call>7</tool_call>x", "", [], "<tool_call>7</tool_call>x"),
    "partial tags": ("a < b <tool <tool_ca ll> </tool_call> <t", "", [], "a < b <tool <tool_ca ll> </tool_call> <t"),
    "line breaks": ("\n\nx\n\n", "", [], "\n\nx\n\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_cut_gives_what_the_whole_gives(name: str) -> None:
    text, thought, calls, answer = CASES[name]
    whole = found([text])
    assert whole[0] == thought and whole[2] == answer
    assert [{"name": call.name, "arguments": json.loads(call.arguments)} for call in whole[1]] == calls
    for cut in range(len(text) + 1):
        assert found([text[:cut], text[cut:]]) == whole
    assert found(list(text)) == whole
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
        assert found([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.integers(0, 10**6))
def test_any_mixture_of_pieces_is_found_the_same_at_any_cut(parts: list[str], seed: int) -> None:
    text, rng = "".join(parts), random.Random(seed)
    whole = found([text])
    assert found(list(text)) == whole
    cut = rng.randrange(len(text) + 1)
    assert found([text[:cut], text[cut:]]) == whole


def test_a_hostile_block_takes_no_long_time_and_is_text() -> None:
    for text in ("<tool_call>" + "[" * 100_000, "<tool_call>" + '"\\' * 50_000, "<tool_call>" * 2000):
        tools = ToolSplitter()
        pieces = [piece for start in range(0, len(text), 5000) for piece in tools.push(text[start:start + 5000])] + tools.finish()
        assert "".join(map(str, pieces)) == text


@pytest.mark.parametrize("text", ["", "  ", '{"name": ""}', '{"name": 3}', '{"arguments": {}}', '{"name": "f", "arguments": [1]}', "{}",
                                  '{"name": "f"} x', '{"name": "f", "arguments": "[]"}', '{"name": "f", "arguments": {"x": Infinity}}'])
def test_what_is_no_call(text: str) -> None:
    assert parse_calls(text) is None


def test_the_rule_of_calls_is_a_grammar_that_calls_keep_to(tokenizer) -> None:  # type: ignore[no-untyped-def]
    from sparseling.run.constraint import Grammar, Vocabulary

    vocabulary = Vocabulary(tokenizer, 420, (tokenizer.eos_id,))
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}, {"name": "g"}]

    def accepted(text: str, several: bool) -> bool:
        grammar = Grammar(vocabulary, calls_rule(tools, several))
        for token in tokenizer.encode(text):
            if not grammar.allowed()[token]:
                return False
            grammar.push(token)
        return bool(grammar.allowed()[tokenizer.eos_id])

    one = '<tool_call>\n{"name": "f", "arguments": {"a": 3}}\n</tool_call>'
    other = '<tool_call>\n{"name":"g","arguments":{"x":"ü"}}\n</tool_call>'
    assert accepted(one, True) and accepted(other, False) and accepted(f"{one}\n{other}", True) and not accepted(f"{one}\n{other}", False)
    assert not accepted(one.replace("3", '"3"'), True) and not accepted(one.replace('"f"', '"h"'), True) and not accepted("hello", True)
