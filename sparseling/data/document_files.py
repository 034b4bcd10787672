"""Files of documents: JSON lines `{"id", "text"}`, written safely and read with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import UserError
from ..files import write_aside
from .readers import Document


def write_documents(path: Path, documents: Iterable[Document]) -> tuple[int, int]:
    """Write `{"id", "text"}` lines; the number of documents and of bytes of text. The path is as before when anything fails."""
    count = size = 0
    with write_aside(path) as stream:
        for name, text in documents:
            # A file name may hold bytes that are no UTF-8.
            name = name.encode("utf-8", "replace").decode()
            stream.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            count += 1
            size += len(text.encode())
    return count, size


def read_documents(path: str | Path) -> Iterator[Document]:
    """The (id, text) pairs of a JSON-lines file. Raises `UserError` that names the file and the line."""
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    value = json.loads(line)
                    identity, text = value["id"], value["text"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path}: line {number} is not a JSON object with 'id' and 'text'; mend or delete the line") from None
                if not isinstance(identity, str) or not isinstance(text, str):
                    raise UserError(f"{path}: line {number} has an 'id' or 'text' that is not a string; mend or delete the line")
                yield identity, text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
