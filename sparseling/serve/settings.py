"""What a server allows, and who may use it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError


@dataclass(frozen=True)
class Settings:
    """`name`: the model's in the API. `keys`: SHA-256 of each API key and what it is called; empty: everybody may. All times in seconds.

    `max_streams` answers are computed at once and `max_waiting` more may wait. `think`: detailed thinking where a request does not say.
    """

    name: str
    max_streams: int = 64
    max_waiting: int = 256
    think: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    requests_per_minute: int | None = None
    max_body_bytes: int = 4 << 20
    max_choices: int = 16
    request_seconds: float = 600.0
    body_seconds: float = 30.0
    drain_seconds: float = 300.0


def read_keys(path: str | Path) -> dict[str, str]:
    """The keys of a file, one a line as `KEY` or `NAME: KEY`; empty lines and those that begin with # are passed over.

    Raises `UserError` for a file that cannot be read, or has no key.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file with one key a line") from None
    keys = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if line and not line.startswith("#"):
            name, _, key = line.rpartition(":")
            if not key.strip() or not key.isascii():
                raise UserError(f"{path}:{number}: holds no key of plain letters, digits and signs; write KEY or NAME: KEY")
            keys[key_hash(key.strip())] = name.strip() or f"key-{number}"
    if not keys:
        raise UserError(f"{path}: holds no key; write one a line, such as 'phone: LONG-RANDOM-WORD'")
    return keys


def key_hash(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()
