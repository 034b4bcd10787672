"""The streaming splitter agrees with the parser of whole responses, however the text is cut into pieces."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparseling.align.chat import parse_response
from sparseling.run.thinking import ThinkingSplitter

PARTS = ["<think>", "</think>", "\n", "a", " b", "<", "</", "think>", "</thi", "<th"]


def split(pieces: list[str]) -> tuple[str, str, list[str]]:
    splitter = ThinkingSplitter()
    shown = [piece for text in pieces for piece in splitter.push(text)] + splitter.finish()
    thought = "".join(text for kind, text in shown if kind == "thought")
    answer = "".join(text for kind, text in shown if kind == "answer")
    return thought, answer, [kind for kind, _ in shown]


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.sampled_from(["", "\n<think>\n", "<think>"]), st.lists(st.sampled_from(PARTS), max_size=12))
@example("<think>", ["a", "\n", "</thi"])
@example("\n<think>\n", ["a", "\n", "</think>", "\n", "\n", "b"])
def test_thought_and_answer_are_those_of_parse_response_for_every_cut(opening: str, parts: list[str]) -> None:
    response = opening + "".join(parts)
    if "</think>" in response and not response.lstrip().startswith("<think>"):
        return                                                   # such a thought cannot be known as one before it ends
    reasoning, content = parse_response(response)
    for pieces in ([response], list(response), [opening, *parts]):
        thought, answer, kinds = split(pieces)
        assert (thought, answer) == (reasoning or "", content)
        assert kinds == sorted(kinds, reverse=True), "all thought comes before all answer"


def test_text_comes_out_as_soon_as_it_is_certain() -> None:
    splitter = ThinkingSplitter()
    coming = [splitter.push(text) for text in ["\n", "<thi", "nk>", "\nWe", " add", ".\n", "<", "b", "</thin", "k>\n\n", "5", " <", "!"]]
    assert [[text for _, text in pieces] for pieces in coming] == [
        [], [], [], ["We"], [" add"], ["."], [], ["\n<b"], [], [], ["5"], [" <"], ["!"],
    ]  # fmt: skip
