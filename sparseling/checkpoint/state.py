"""Training state: written aside, hashed, flushed, renamed; a damaged one is found by its hashes and the one before is used.

A checkpoint is a folder `step-00000123/`: a torch DCP directory `tensors/`, `trainer.json` (step, counters, spike state), and
`manifest.json` with the size and SHA-256 of every file. The manifest is the last file written and the folder's name the last
thing renamed, so a folder with the right name and hashes is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ..errors import UserError
from ..files import disk_full, fsync_folder, read_json, sha256_of_file, write_json
from ..progress import say


@dataclass(frozen=True)
class SavedState:
    """One verified checkpoint on disk."""

    folder: Path
    step: int


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return parent / f"step-{step:08d}"


def save_checkpoint(parent: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], trainer: dict[str, Any], keep: int = 2) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. `tensors` maps a group ("model", "optimizer") to named tensors."""
    final = checkpoint_folder(parent, step)
    aside = parent / f".{final.name}.tmp"
    parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        with single_process():
            dcp.save(dict(tensors), checkpoint_id=str(aside / "tensors"), no_dist=True)
        write_json(aside / "trainer.json", trainer)
        write_json(aside / "manifest.json", {"step": step, "files": {
            str(path.relative_to(aside)): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)} for path in files_of(aside)
        }})
        for path in files_of(aside):
            flush(path)
        fsync_folder(aside / "tensors")
        fsync_folder(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        fsync_folder(parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_full(cause_of(error), final) or error from None
    for old in list_checkpoints(parent)[:-keep]:
        shutil.rmtree(old.folder)
    return final


def cause_of(error: BaseException) -> BaseException:
    """DCP wraps what went wrong on each rank, `failures` {rank: (error, traceback)}: the first of them, else the error itself."""
    if isinstance(error, dcp.api.CheckpointException):
        return next((failure[0] for failure in error.failures.values()), error)
    return error


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """DCP warns that torch.distributed is off; on one process that is as intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def files_of(folder: Path) -> list[Path]:
    """All files below `folder` but the manifest, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def flush(path: Path) -> None:
    """Force a file's bytes to the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def list_checkpoints(parent: Path) -> list[SavedState]:
    """Checkpoints by step, oldest first, without verifying them."""
    if not parent.is_dir():
        return []
    names = sorted(path for path in parent.iterdir() if path.name.startswith("step-") and path.name[5:].isdigit())
    return [SavedState(path, int(path.name[5:])) for path in names]


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: sizes first, then hashes."""
    try:
        manifest = read_json(folder / "manifest.json")["files"]
    except (UserError, KeyError, TypeError):
        return "manifest.json is missing or broken"
    for name, facts in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"] or sha256_of_file(path) != facts["sha256"]:
            return f"{name} does not match its hash"
    return None


def newest_good_checkpoint(parent: Path) -> SavedState | None:
    """The newest checkpoint whose hashes are right; damaged ones are named in a warning and left where they are.

    Raises `UserError` when there are checkpoints and all are damaged: starting from nothing would throw the run away in silence.
    """
    found = list_checkpoints(parent)
    for checkpoint in reversed(found):
        problem = damage(checkpoint.folder)
        if problem is None:
            return checkpoint
        say(f"warning: checkpoint {checkpoint.folder} is damaged ({problem}); using the one before it")
    if found:
        raise UserError(f"{parent}: every checkpoint is damaged; restore one from a copy, or delete the folder to start the stage again")
    return None


def load_checkpoint(checkpoint: SavedState, tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, Any]:
    """Fill `tensors` in place from a verified checkpoint and return its trainer state.

    Raises `UserError` when the checkpoint does not hold the tensors asked for (the model's shape was changed).
    """
    try:
        with single_process():
            dcp.load(dict(tensors), checkpoint_id=str(checkpoint.folder / "tensors"), no_dist=True)
    except (RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        raise UserError(f"{checkpoint.folder}: does not fit this model ({str(error).splitlines()[0]}); the recipe's model was "
                        "changed, use another --name") from None
    trainer: dict[str, Any] = read_json(checkpoint.folder / "trainer.json")
    return trainer
