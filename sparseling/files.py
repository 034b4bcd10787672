"""Writing so that nothing is ever lost: aside, flush, rename; and hashing what was written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError


@contextlib.contextmanager
def write_aside(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing under a temporary name; on success flush to disk and rename over `path`.

    On any failure the temporary file is removed and `path` is as it was before; what a killed process left aside goes with the next
    write. A full disk raises `UserError`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
        fsync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise disk_full(error, path) or error from None


def remove_leftovers(path: Path) -> None:
    """Remove temporary files for `path` whose process is gone."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = aside.name.split(".")[-2]
        if not number.isdigit():
            continue
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            aside.unlink(missing_ok=True)
        except (PermissionError, OverflowError):
            pass  # somebody else's process is still there


def disk_full(error: BaseException, path: Path) -> UserError | None:
    """A `UserError` when `error` says that the disk is full (or over quota), else None."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: the disk is full; free some space and run the same command again, what was finished is kept")
    return None


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process: two writers would mix their files. The lock goes with the process, however it ends.

    Raises `UserError` when another process holds it.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise UserError(f"{folder}: process {stream.read().strip() or 'unknown'} is working there; wait for it, or end it") from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, safely."""
    with write_aside(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is a `UserError` that names it."""
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore or delete the file") from None


def sha256_of_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(value: Any) -> str:
    """Hex SHA-256 of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
