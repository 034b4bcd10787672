"""One domain's sources into its training and validation documents: cut to length, sampled, without repeats, split by hash."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..files import sha256_of_file
from .dedup import exact_duplicates, near_duplicates, overlapping, text_hash
from .document_files import read_documents, write_documents
from .readers import Document

# Worked solutions of one family share most of their words and differ in the numbers: near duplicates stay there.
KEEPS_NEAR_DUPLICATES = ("worked",)
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """How a domain is split. `max_bytes`: by source name or domain. `max_document_bytes`: None leaves documents whole."""

    validation_share: float
    max_bytes: Mapping[str, int]
    max_document_bytes: int | None
    seed: int
    prompts: Sequence[str] = ()


class Entry(NamedTuple):
    """A document (a part of a long one) and the hash of its text, which decides all that happens to it."""

    name: str
    text: str
    key: bytes


def split_domain(domain: str, parts: Mapping[str, Path], folder: Path, how: Split) -> dict[str, Any]:
    """Write `train/<domain>.jsonl` and `validation/<domain>.jsonl` below `folder` out of the sources' files `parts`; returns the counts.

    A domain is held in memory. Documents are cut first, so that a few huge ones cannot keep a source out of the sample or of validation;
    each part then goes its own way, by its hash. Every source with two parts or more has some on both sides.
    """
    dropped: Counter[str] = Counter()

    def without(flags: Iterable[bool], reason: str) -> list[Entry]:
        kept = [entry for entry, flag in zip(entries, flags, strict=True) if not flag]
        dropped[reason] += len(entries) - len(kept)
        return kept

    entries: list[Entry] = []
    for source, path in parts.items():
        whole = ((f"{source}/{name}", text) for name, text in read_documents(path))
        pieces = [Entry(name, text, text_hash(text)) for document in whole for name, text in cut_document(document, how.max_document_bytes)]
        entries += sampled(pieces, how.max_bytes.get(source), how.seed, dropped)
    entries = sampled(entries, how.max_bytes.get(domain), how.seed, dropped)
    entries = without(exact_duplicates(entry.key for entry in entries), "exact duplicate")
    if domain not in KEEPS_NEAR_DUPLICATES:
        entries = without(near_duplicates([entry.text for entry in entries], seed=how.seed), "near duplicate")
    entries = without(overlapping((entry.text for entry in entries), how.prompts), "overlaps an evaluation prompt")
    held_out = held_out_by_source(entries, how.validation_share, how.seed)
    counts: dict[str, Any] = {"dropped": {reason: count for reason, count in dropped.items() if count}}
    for split in SPLITS:
        chosen = [(entry.name, entry.text) for entry, flag in zip(entries, held_out, strict=True) if flag == (split == "validation")]
        path = folder / split / f"{domain}.jsonl"
        documents, size = write_documents(path, chosen)
        counts[split] = {"documents": documents, "bytes": size, "file_bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    return counts


def sampled(entries: list[Entry], max_bytes: int | None, seed: int, dropped: Counter[str]) -> list[Entry]:
    """At most `max_bytes` of text: the documents of lowest hash that fit, in their given order; an even sample, the same on every run."""
    if max_bytes is None:
        return entries
    left, chosen = max_bytes, set()
    for row in sorted(range(len(entries)), key=lambda row: draw(entries[row].key, "sample", seed)):
        size = len(entries[row].text.encode())
        if size <= left:
            left -= size
            chosen.add(row)
    dropped["over max_bytes"] += len(entries) - len(chosen)
    return [entry for row, entry in enumerate(entries) if row in chosen]


def held_out_by_source(entries: Sequence[Entry], share: float, seed: int) -> list[bool]:
    """Whether each entry goes to validation, decided source by source (the name's part before the slash)."""
    rows_of: dict[str, list[int]] = {}
    for row, entry in enumerate(entries):
        rows_of.setdefault(entry.name.split("/", 1)[0], []).append(row)
    flags = [False] * len(entries)
    for rows in rows_of.values():
        for row, flag in zip(rows, validation_flags([entries[row].key for row in rows], share, seed), strict=True):
            flags[row] = flag
    return flags


def validation_flags(keys: Sequence[bytes], share: float, seed: int) -> list[bool]:
    """Whether each document is held out: about `share` of them; for `share` > 0 at least one on each side when there are two or more."""
    draws = [draw(key, "validation", seed) for key in keys]
    flags = [value < share for value in draws]
    if share > 0 and len(keys) > 1:
        if not any(flags):
            flags[draws.index(min(draws))] = True
        if all(flags):
            flags[draws.index(max(draws))] = False
    return flags


def draw(key: bytes, purpose: str, seed: int) -> float:
    """A number in [0, 1) that depends on the document, the purpose and the seed alone."""
    digest = hashlib.blake2b(key, digest_size=8, person=purpose.encode(), salt=seed.to_bytes(16, "little", signed=True)).digest()
    return int.from_bytes(digest, "big") / 2**64


def cut_document(document: Document, max_bytes: int | None) -> Iterator[Document]:
    """The document, or its parts of at most `max_bytes` each, named `...#part-0`, `...#part-1`, ..."""
    name, text = document
    if max_bytes is None or len(text) * 4 <= max_bytes or len(text.encode()) <= max_bytes:
        yield name, text
        return
    parts = (part.strip("\n") for part in cut(text, max_bytes))
    for number, part in enumerate(part for part in parts if part.strip()):
        yield f"{name}#part-{number}", part


def cut(text: str, max_bytes: int, separators: Sequence[str] = ("\n\n", "\n", " ", "")) -> Iterator[str]:
    """Pieces of at most `max_bytes` (4 or more) of UTF-8 that join to the text.

    Cut at paragraph ends; a longer paragraph at line ends, a longer line at spaces, a longer word anywhere.
    """
    separator, *finer = separators
    *ended, last = text.split(separator) if separator else [*text, ""]
    pieces = [*(piece + separator for piece in ended), *([last] if last else [])]
    held: list[str] = []
    size = 0
    for piece in pieces:
        length = len(piece.encode())
        if held and size + length > max_bytes:
            yield "".join(held)
            held, size = [], 0
        if length > max_bytes:
            yield from cut(piece, max_bytes, finer)
        else:
            held.append(piece)
            size += length
    if held:
        yield "".join(held)
