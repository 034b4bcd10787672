"""Readers of packed book formats: dictd dictionaries, SWORD modules, R data bases."""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from .readers import Document, decode, decompressed, walk

DICTD_DIGITS = {digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
# Neighbouring short entries share a document, so that a document is a page to read and not a line.
PAGE_CHARACTERS = 8_000


def pages(name: str, entries: Iterable[str], characters: int = PAGE_CHARACTERS) -> Iterator[Document]:
    """Join consecutive entries, a blank line between them, into documents of at least `characters` each (the last may be shorter)."""
    page: list[str] = []
    size = number = 0
    for entry in entries:
        page.append(entry)
        size += len(entry)
        if size >= characters:
            yield f"{name}#{number}", "\n\n".join(page)
            page, size, number = [], 0, number + 1
    if page:
        yield f"{name}#{number}", "\n\n".join(page)


def dictd(place: Path) -> Iterator[Document]:
    """Dictionaries of the DICT server: `NAME.dict.dz` (gzip) holds the entries, `NAME.index` their headword, offset and length.

    Offset and length are base-64 numbers (dictfmt(1)). An entry with several headwords is taken once.
    """
    for name, path in walk(place):
        if not name.endswith(".index"):
            continue
        packed = next((p for p in (path.with_suffix(".dict.dz"), path.with_suffix(".dict")) if p.exists()), None)
        if packed is not None:
            data = decompressed(packed.name, packed.read_bytes())
            yield from pages(path.stem, dictd_entries(data, decode(path.read_bytes())))


def dictd_entries(data: bytes, index: str) -> Iterator[str]:
    """The entries of a dictd data base in the index's (alphabetical) order; its own `00database...` entries are left out."""
    seen: set[int] = set()
    for line in index.splitlines():
        headword, *numbers = line.split("\t")
        if len(numbers) < 2 or headword.startswith("00"):
            continue
        start, length = (dictd_number(number) for number in numbers[:2])
        if start not in seen:
            seen.add(start)
            yield re.sub(r"[{}]", "", decode(data[start : start + length])).strip()


def dictd_number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + DICTD_DIGITS[digit]
    return value


def sword(place: Path) -> Iterator[Document]:
    """SWORD modules without libsword: compressed Bibles and commentaries (zText, zCom) and dictionaries (zLD).

    A zText/zCom block is one zlib stream of OSIS or ThML markup; `.?zs` lists 12 bytes a block: offset, packed size, size. A zLD block
    starts with a count and as many (offset, size) pairs; `.zdx` lists 8 bytes a block: offset, packed size. All little-endian.
    """
    for name, path in walk(place):
        if re.search(r"\.[bcsv]zz$", name):
            yield from pages(name, sword_blocks(path.read_bytes(), Path(str(path)[:-1] + "s").read_bytes(), "<III", 0))
        elif name.endswith(".zdt"):
            yield from pages(name, sword_blocks(path.read_bytes(), path.with_suffix(".zdx").read_bytes(), "<II", 8))


def sword_blocks(data: bytes, index: bytes, entry: str, pair_bytes: int) -> Iterator[str]:
    """The plain text of each block; `pair_bytes` is the size of one row of the table at the start of a block (0: no table)."""
    whole = len(index) - len(index) % struct.calcsize(entry)
    for offset, size, *_ in struct.iter_unpack(entry, index[:whole]):
        block = zlib.decompress(data[offset : offset + size]) if size else b""
        if pair_bytes and len(block) >= 4:
            block = block[4 + pair_bytes * struct.unpack("<I", block[:4])[0] :].replace(b"\x00", b"\n\n")
        text = osis_to_text(decode(block))
        if text:
            yield text


def osis_to_text(markup: str) -> str:
    """OSIS, ThML or TEI markup to plain text: notes dropped, a paragraph for each paragraph, title and stanza."""
    markup = re.sub(r"<note\b.*?</note>|<(rawref|scripRef\b[^>]*)/>", "", markup, flags=re.DOTALL)
    markup = re.sub(r"</?(title|p|chapter|list|lg|entryFree)\b[^>]*>|<div\b[^>]*type=\"(x-p|paragraph|section)\"[^>]*>", "\n\n", markup)
    markup = re.sub(r"<(lb|br|l|item|milestone|verse)\b[^>]*>", "\n", markup)
    text = html.unescape(re.sub(r"<[^>]+>", "", markup))
    return "\n\n".join(paragraph for raw in re.split(r"\n\s*\n", text) if (paragraph := " ".join(raw.split())))


def r_strings(place: Path) -> Iterator[Document]:
    """Character vectors of R's lazy-load data bases (`.rdb`): each vector of some length as one document, its hard line breaks undone.

    An `.rdb` file is a row of blocks: 4 bytes of size (big-endian), then a zlib stream of an R object in XDR serialisation.
    """
    for name, path in walk(place):
        if name.endswith(".rdb"):
            data, start = path.read_bytes(), 0
            while start + 4 < len(data):
                stream = zlib.decompressobj()
                block = stream.decompress(data[start + 4 :])
                for number, lines in enumerate(r_character_vectors(block)):
                    yield f"{name}@{start}.{number}", unwrap("\n".join(lines))
                start = len(data) - len(stream.unused_data)


def r_character_vectors(block: bytes, at_least: int = 20) -> Iterator[list[str]]:
    """The STRSXP vectors (type 16) of at least `at_least` strings in a serialised R object; each string is a CHARSXP (type 9)."""
    position = 0
    while (position := block.find(b"\x00\x00\x00\x10", position)) >= 0:
        count = int.from_bytes(block[position + 4 : position + 8], "big")
        strings, end = r_strings_at(block, position + 8, count) if at_least <= count <= len(block) // 8 else ([], position + 4)
        if strings:
            yield strings
        position = max(end, position + 4)


def r_strings_at(block: bytes, position: int, count: int) -> tuple[list[str], int]:
    """`count` strings that start at `position`, and where they end; no strings when these are not strings after all."""
    strings = []
    for _ in range(count):
        flags, length = block[position : position + 4], int.from_bytes(block[position + 4 : position + 8], "big", signed=True)
        if len(flags) < 4 or flags[3] != 9 or length > len(block) - position - 8:
            return [], position
        position += 8 + max(length, 0)  # length -1 is NA
        strings.append(decode(block[position - max(length, 0) : position]))
    return strings, position


def unwrap(text: str) -> str:
    """Join the lines of each paragraph; paragraphs stay apart by a blank line."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())
