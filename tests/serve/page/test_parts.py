"""The parts of the page that reckon: the stream's events, the cutting of text into tokens."""

from __future__ import annotations

import json
import random
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .fake_server import PAGE, tokens_of


def test_events_survive_every_cut(page: Any) -> None:
    stream = "data: {\"a\": \"😀é\"}\r\n\r\n: ping\n\ndata: one\ndata: two\n\nevent: x\rdata:three\r\rdata: [DONE]\n\ndata: unfinished"
    found = page.evaluate("""async (text) => {
        const { events } = await import('/page/sse.js');
        const bytes = new TextEncoder().encode(text);
        const all = [];
        for (let first = 0; first <= bytes.length; first += 1) for (const second of [first, first + 1, first + 5]) {
            const parts = [bytes.slice(0, first), bytes.slice(first, second), bytes.slice(second)];
            const start = (controller) => { parts.forEach((part) => controller.enqueue(part)); controller.close(); };
            const body = new ReadableStream({ start });
            const got = [];
            for await (const data of events(body)) got.push(data);
            all.push(JSON.stringify(got));
        }
        return [...new Set(all)];
    }""", stream)
    assert [json.loads(each) for each in found] == [['{"a": "😀é"}', "one\ntwo", "three", "[DONE]"]]


CUT = """async (acts) => {
    const { Cutter } = await import('/page/cut.js');
    const cutter = new Cutter();
    let number = 0;
    const pieces = acts.flatMap(([kind, text]) => (kind === 'text' ? cutter.pushText(text) : cutter.pushEntry({ number: number++, text })));
    pieces.push(...cutter.finish());
    return [pieces.map((piece) => piece.text), cutter.rest, pieces.map((piece) => piece.entry.number)];
}"""


def acts_of(texts: list[str], said: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """The texts in order, and what each token says it is in order too, up to three texts late or two early."""
    acts: list[tuple[str, str]] = []
    told = 0
    for place, text in enumerate(texts):
        acts.append(("text", text))
        while told < len(said) and (told <= place - 3 or (told <= place + 2 and rng.random() < 0.5)):
            acts.append(("entry", said[told]))
            told += 1
    return acts + [("entry", text) for text in said[told:]]


def test_pieces_are_the_text_whatever_comes_when(page: Any) -> None:
    rng = random.Random(5)
    for _ in range(40):
        answer = tokens_of(rng.choice(["hostile", "sum"]), True)
        tokens = [token if isinstance(token, str) else token.decode("utf-8", "replace") for token in answer]
        said = [rng.choice([token, token, token, "", "\ufffd", token + "?"]) for token in tokens]
        pieces, rest, numbers = page.evaluate(CUT, acts_of(tokens, said, rng))
        assert "".join(pieces) + rest == "".join(tokens) and numbers == list(range(len(tokens)))


def test_each_token_finds_its_own_piece(page: Any) -> None:
    rng = random.Random(6)
    for _ in range(40):
        words = [rng.choice([" a", " the", "e", "e", "the", "\n", " 😀", "é", "</thin"]) for _ in range(30)]
        pieces, rest, _ = page.evaluate(CUT, acts_of(words, words, rng))
        assert pieces == words and rest == ""
        # The reasoning's own line breaks and tags are tokens, but no text.
        pieces, rest, _ = page.evaluate(CUT, acts_of([word for word in words if word != "\n"], ["<think>", "\n", *words], rng))
        assert "".join(pieces) == "".join(word for word in words if word != "\n") and rest == ""


def test_a_character_of_several_tokens_is_its_last_ones(page: Any) -> None:
    rng = random.Random(7)
    cut = ["\ufffd", "\ufffd"]
    for _ in range(40):
        texts, said, expected = [], [], []
        for _ in range(12):
            if rng.random() < 0.3 and texts and texts[-1].isascii():
                texts, said, expected = [*texts, "", "😀"], [*said, *cut], [*expected, "", "😀"]
            else:
                word = rng.choice([" a", " the", "e", " b."])
                texts, said, expected = [*texts, word], [*said, word], [*expected, word]
        pieces, rest, _ = page.evaluate(CUT, acts_of(texts, said, rng))
        assert pieces == expected and rest == ""


def test_every_file_of_the_page_is_packaged() -> None:
    settings = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["sparseling"]
    for path in PAGE.rglob("*"):
        assert any(fnmatch(f"serve/page/{path.name}", pattern) for pattern in patterns), path
