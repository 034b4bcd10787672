"""The split: by the hash of whole documents, disjoint, repeatable, within its limits; and nothing lost when documents are cut."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseling.data.dedup import text_hash
from sparseling.data.document_files import read_documents, write_documents
from sparseling.data.split import Entry, Split, cut, cut_document, draw, sampled, split_domain, validation_flags

SEPARATORS = ["a", "bc", "é", "日本", "\n", "\n\n", " ", "x" * 30]
WHOLE = Split(validation_share=0.1, max_bytes={}, max_document_bytes=None, seed=0)


def entries(count: int, size: int = 100, seed: int = 0) -> list[Entry]:
    chance = random.Random(seed)
    texts = [" ".join(f"w{chance.randrange(10_000)}" for _ in range(size // 6)) for _ in range(count)]
    return [Entry(str(number), text, text_hash(text)) for number, text in enumerate(texts)]


def write_part(path: Path, rows: list[Entry]) -> Path:
    write_documents(path, ((entry.name, entry.text) for entry in rows))
    return path


def read_split(folder: Path, domain: str) -> dict[str, list[tuple[str, str]]]:
    return {split: list(read_documents(folder / split / f"{domain}.jsonl")) for split in ("train", "validation")}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(SEPARATORS), max_size=80).map("".join), st.integers(4, 60))
def test_cut_pieces_join_to_the_text_and_fit(text: str, max_bytes: int) -> None:
    pieces = list(cut(text, max_bytes))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)


def test_cut_prefers_paragraph_ends() -> None:
    paragraphs = [f"Paragraph {number} has a line\nand another one." for number in range(20)]
    text = "\n\n".join(paragraphs)
    parts = list(cut_document(("book", text), 120))
    assert [name for name, _ in parts] == [f"book#part-{number}" for number in range(len(parts))] and len(parts) > 5
    assert [line for _, part in parts for line in part.split("\n\n")] == paragraphs
    assert list(cut_document(("book", text), None)) == [("book", text)]
    assert list(cut_document(("book", text), len(text))) == [("book", text)]


def test_draws_are_uniform_and_independent() -> None:
    keys = [entry.key for entry in entries(4_000, size=20)]
    samples, held = ([draw(key, purpose, 0) for key in keys] for purpose in ("sample", "validation"))
    for values in (samples, held):
        tenths = Counter(int(value * 10) for value in values)
        assert all(320 < tenths[tenth] < 480 for tenth in range(10))  # 400 expected, standard deviation 19
    # Were the two draws the same, a small sample would be all validation.
    lowest = sorted(range(len(keys)), key=samples.__getitem__)[:400]
    assert 10 < sum(held[row] < 0.1 for row in lowest) < 80
    assert [draw(key, "sample", 1) for key in keys] != samples


def test_validation_share_and_at_least_one() -> None:
    keys = [entry.key for entry in entries(2_000, size=20)]
    assert 140 < sum(validation_flags(keys, 0.1, seed=0)) < 260
    for count in range(2, 8):
        for share in (0.001, 0.5, 0.999):
            assert 1 <= sum(validation_flags(keys[:count], share, seed=3)) <= count - 1
    assert validation_flags(keys[:1], 0.001, seed=0) == [False]
    assert not any(validation_flags(keys, 0.0, seed=0))


def test_a_document_keeps_its_side_when_others_come() -> None:
    keys = [entry.key for entry in entries(500, size=20)]
    assert validation_flags(keys, 0.1, 0)[:200] == validation_flags(keys[:200], 0.1, 0)


def test_sample_fits_and_a_smaller_one_of_equal_documents_is_part_of_it() -> None:
    texts = [f"{number:099d}." for number in range(300)]
    rows = [Entry(text, text, text_hash(text)) for text in texts]
    dropped: Counter[str] = Counter()
    small, large = (sampled(rows, limit, 0, dropped) for limit in (2_050, 10_000))
    assert (len(small), len(large)) == (20, 100)
    assert set(small) < set(large) and [row for row in rows if row in set(large)] == large
    assert dropped == {"over max_bytes": 280 + 200}
    assert max(int(row.name[:-1]) for row in small) > 200  # not the first ones
    assert sampled(rows, None, 0, dropped) == rows


def test_split_is_disjoint_complete_and_repeatable(tmp_path: Path) -> None:
    rows = entries(200)
    parts = {"one": write_part(tmp_path / "one.jsonl", rows[:120]), "two": write_part(tmp_path / "two.jsonl", rows[100:])}
    counts = split_domain("prose", parts, tmp_path / "a", WHOLE)
    assert split_domain("prose", parts, tmp_path / "b", WHOLE) == counts
    split = read_split(tmp_path / "a", "prose")
    assert counts["dropped"] == {"exact duplicate": 20}
    texts = [text for side in split.values() for _, text in side]
    assert len(texts) == 200 and set(texts) == {row.text for row in rows}
    assert {name.split("/")[0] for name, _ in split["train"]} == {"one", "two"}
    for side in split:
        assert counts[side]["documents"] == len(split[side])
        assert counts[side]["bytes"] == sum(len(text.encode()) for _, text in split[side])
        assert (tmp_path / "a" / side / "prose.jsonl").read_bytes() == (tmp_path / "b" / side / "prose.jsonl").read_bytes()


def test_every_source_has_validation_text_even_of_one_book(tmp_path: Path) -> None:
    book = [Entry("book", "\n\n".join(entry.text for entry in entries(300, seed=5)), b"")]
    parts = {"book": write_part(tmp_path / "book.jsonl", book), "notes": write_part(tmp_path / "notes.jsonl", entries(400, seed=6))}
    split_domain("prose", parts, tmp_path, Split(validation_share=0.01, max_bytes={}, max_document_bytes=1_000, seed=0))
    split = read_split(tmp_path, "prose")
    for rows in split.values():
        assert {name.split("/")[0] for name, _ in rows} == {"book", "notes"}
        assert all(len(text.encode()) <= 1_000 for _, text in rows)
    texts = [text for rows in split.values() for _, text in rows]
    assert len(texts) == len(set(texts)) and sum(text.count("\n\n") + 1 for text in texts) == 700  # nothing lost, nothing twice


def test_near_duplicates_do_not_cross_the_split_and_worked_solutions_stay(tmp_path: Path) -> None:
    rows = entries(40, size=600)
    rows += [Entry(f"copy {row.name}", row.text + " and more", b"") for row in rows]
    part = write_part(tmp_path / "part.jsonl", rows)
    assert split_domain("prose", {"part": part}, tmp_path / "p", WHOLE)["dropped"] == {"near duplicate": 40}
    assert split_domain("worked", {"part": part}, tmp_path / "w", WHOLE)["dropped"] == {}


def test_limits_by_source_and_domain_hold_together(tmp_path: Path) -> None:
    parts = {name: write_part(tmp_path / f"{name}.jsonl", entries(100, seed=seed)) for name, seed in (("one", 1), ("two", 2))}
    how = Split(validation_share=0.1, max_bytes={"one": 2_000, "prose": 6_000}, max_document_bytes=None, seed=0)
    counts = split_domain("prose", parts, tmp_path / "out", how)
    split = read_split(tmp_path / "out", "prose")
    rows = [*split["train"], *split["validation"]]
    assert 5_500 < sum(len(text.encode()) for _, text in rows) <= 6_000
    assert sum(len(text.encode()) for name, text in rows if name.startswith("one/")) <= 2_000
    assert counts["dropped"].keys() == {"over max_bytes"}


def test_documents_that_hold_a_prompt_are_left_out(tmp_path: Path) -> None:
    rows = entries(20)
    prompt = rows[3].text
    counts = split_domain("prose", {"one": write_part(tmp_path / "one.jsonl", rows)}, tmp_path, Split(0.1, {}, None, 0, (prompt,)))
    assert counts["dropped"] == {"overlaps an evaluation prompt": 1}
    assert all(prompt not in text for side in read_split(tmp_path, "prose").values() for _, text in side)


def test_written_documents_read_back_with_odd_names_and_characters(tmp_path: Path) -> None:
    rows = [("a\udcff.txt", "line\u2028separator\x85 and \"quotes\"\n\ttab 𝄞")]
    assert write_documents(tmp_path / "x.jsonl", rows) == (1, len(rows[0][1].encode()))
    assert list(read_documents(tmp_path / "x.jsonl")) == [("a?.txt", rows[0][1])]
    assert len((tmp_path / "x.jsonl").read_text().rstrip("\n").split("\n")) == 1
    assert json.loads((tmp_path / "x.jsonl").read_bytes())["text"] == rows[0][1]


@pytest.mark.parametrize("count", [0, 1])
def test_no_and_one_document(tmp_path: Path, count: int) -> None:
    counts = split_domain("prose", {"one": write_part(tmp_path / "one.jsonl", entries(count))}, tmp_path, WHOLE)
    assert (counts["train"]["documents"], counts["validation"]["documents"]) == (count, 0)
