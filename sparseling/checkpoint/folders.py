"""Writing a whole folder so that it is either complete under its name or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import disk_full, fsync_folder


@contextlib.contextmanager
def write_folder_aside(folder: str | Path, overwrite: bool = False, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a new empty folder beside `folder`; on success flush it and rename it to `folder`, on failure remove it.

    What a killed process left aside is removed by the next write to the same name. An existing `folder` is a `UserError` unless
    `overwrite`, which keeps the old one until the new one is complete. `needed_bytes` are asked of the disk first.
    """
    folder = Path(folder).absolute()
    aside, old = (folder.with_name(f".{folder.name}.{word}") for word in ("unfinished", "old"))
    restore(old, folder)
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; choose another name or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder.parent).free
        if needed_bytes > free_bytes:
            raise UserError(f"{folder}: needs {needed_bytes / 1e9:.1f} GB and the disk has {free_bytes / 1e9:.1f} GB free; free some space")
        remove(aside)
        aside.mkdir()
        yield aside
        flush(aside)
        remove(old)
        if folder.exists():
            os.replace(folder, old)
        os.replace(aside, folder)
        fsync_folder(folder.parent)
        remove(old)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(aside)
            restore(old, folder)
        if isinstance(error, OSError):
            raise disk_full(error, folder) or UserError(f"{folder}: cannot be written ({error.strerror}); check the path") from None
        raise


def restore(old: Path, folder: Path) -> None:
    """Undo the first of the two renames of a replacement that was killed, or failed, between them."""
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def flush(folder: Path) -> None:
    """Flush every file of a folder to the disk, then the folder itself."""
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    fsync_folder(folder)


def remove(folder: Path) -> None:
    """Remove a folder or file if it is there."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif folder.exists() or folder.is_symlink():
        folder.unlink()
