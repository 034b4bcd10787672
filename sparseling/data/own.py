"""The user's own text: local files and folders, and data sets of the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .readers import CODE, Document, decode, walk

TEXT = r"\.(txt|md|jsonl|jsonl\.gz)$"


@dataclass(frozen=True)
class FileSource:
    """A file or folder of the user's: `.txt` and `.md` (a document each), `.jsonl` and `.jsonl.gz` (a document a line, in `field`).

    For the domain `code` a folder's source files count too. `name` (default: made from the path) names it in the manifest; `max_bytes`
    takes no more than that many bytes of text, chosen by hash.
    """

    path: str
    domain: str
    licence: str = "not stated"
    name: str = ""
    field: str = "text"
    max_bytes: int | None = None


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub, streamed: the text in column `field` of `split`; `config` picks one of its configurations.

    `max_bytes` stops the stream there: reading a data set larger than the disk to its end is nobody's wish.
    """

    name: str
    domain: str
    split: str = "train"
    field: str = "text"
    config: str | None = None
    licence: str = "see its page"
    max_bytes: int | None = None


def own_files(place: Path, domain: str, field: str = "text") -> Iterator[Document]:
    """The documents of a file or folder. Raises `UserError` for a file that is not what its name says."""
    pattern = f"{TEXT}|{CODE}" if domain == "code" else TEXT
    paths = [(place.name, place)] if place.is_file() else [(name, path) for name, path in walk(place) if re.search(pattern, name)]
    if not paths:
        raise UserError(f"{place}: no .txt, .md, .jsonl or .jsonl.gz file in it; name a folder that has some")
    for name, path in paths:
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from json_lines(name, path, field)
        else:
            yield name, decode(path.read_bytes())


def json_lines(name: str, path: Path, field: str) -> Iterator[Document]:
    """One document a line, its id the line's `id` where it has one, else `name:line number`. Bad bytes become Latin-1."""
    try:
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    row = json_object(raw, f"{path}: line {number}")
                    yield str(row.get("id", f"{name}:{number}")), text_of(row, field, f"{path}: line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path}: not a whole gzip file; make it again with gzip") from None


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(decode(raw))
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}); put one JSON object on each line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object; write lines like {{\"text\": \"...\"}}")
    return row


def text_of(row: dict[str, Any], field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        raise UserError(f"{where} has no text under '{field}', only {', '.join(map(repr, row)) or 'nothing'}; set the right `field`")
    return text


def hub_documents(dataset: HubDataset) -> Iterator[Document]:
    """Stream the data set's rows as documents, up to its `max_bytes`. Raises `UserError` for what the hub or the data set does not have."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"huggingface: '{dataset.name}' needs the package datasets; run: pip install 'sparseling[datasets]'") from None
    where = f"huggingface: {dataset.name}, split {dataset.split}"
    taken = 0
    try:
        for number, row in enumerate(load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=True)):
            text = text_of(row, dataset.field, f"{where}: row {number}")
            taken += len(text.encode("utf-8", "replace"))
            if dataset.max_bytes is not None and taken > dataset.max_bytes:
                return
            yield f"{dataset.split}:{number}", text
    except UserError:
        raise
    except Exception as error:  # the library raises its own and its transport's exceptions, of many kinds
        raise UserError(f"{where} could not be read ({type(error).__name__}: {error}); check the name, the split and the network") from None


def file_name(path: Path) -> str:
    """A short name for a source made of a path: its stem in letters, digits, `.`, `_` and `-`."""
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".txt").removesuffix(".md")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "text"
