"""Weighted sums of model folders, tensor by tensor: the merge of WSM (checkpoint/decay.py gives the weights)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import sha256_of_file, write_json
from ..progress import track
from .convert import copy_companions, public_config
from .folders import write_folder_aside
from .hf import MAX_SHARD_BYTES, WeightFolder, open_checkpoint, plan_of, read_checkpoint
from .tensor_files import INDEX, write_shards

CHUNK = 1 << 20  # elements added at a time: bounds the float64 copies


def merge_folders(
    folders: Sequence[str | Path], weights: Sequence[float], out: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write sum_j weights[j] * folders[j] as a public folder, tensor by tensor, accumulated in float64.

    Sharding and dtype of the sources may differ, their shapes may not. expert_bias is merged too and stays float32. dtype None: as the
    last source. Tokenizer and config come from the last source. `merge.json` records weights, sources, SHA-256 of every weight
    file read and written. Raises `UserError` naming the first difference between two sources.
    """
    check_weights(folders, weights)
    checkpoints = [open_checkpoint(folder) for folder in folders]
    for checkpoint in checkpoints[1:]:
        check_same_model(checkpoints[0], checkpoint)
    last = checkpoints[-1]
    dtype = dtype or last.dtype
    plan = plan_of(last.config, dtype)
    with write_folder_aside(out, overwrite, needed_bytes=sum(tensor.size_bytes for tensor in plan.values())) as aside:
        readers = [read_checkpoint(checkpoint, last.tensors, fp8_to=torch.float32) for checkpoint in checkpoints]
        names = track(last.tensors, f"merging {len(checkpoints)} checkpoints", len(last.tensors))
        merged = ((name, weighted_sum((next(reader)[1] for reader in readers), weights)) for name in names)
        write_shards(aside, plan, merged, max_shard_bytes)
        copy_companions(last.folder, aside)
        write_json(aside / "config.json", public_config(last, dtype))
        sources = [{"folder": str(checkpoint.folder), "weight": weight, "sha256": hashes(checkpoint.folder)}
                   for checkpoint, weight in zip(track(checkpoints, "hashing sources", len(checkpoints)), weights, strict=True)]
        record = {"method": "weighted sum (WSM)", "accumulated_in": "float64", "sources": sources, "sha256": hashes(aside)}
        write_json(aside / "merge.json", record)


def check_weights(folders: Sequence[str | Path], weights: Sequence[float]) -> None:
    """One weight a folder, none negative, sum 1; else `UserError`."""
    if not folders:
        raise UserError("merge: no checkpoints; give at least one folder")
    if len(folders) != len(weights):
        raise UserError(f"weights: {len(weights)} for {len(folders)} checkpoints; give one each")
    if not all(weight >= 0 for weight in weights) or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"weights: must not be negative and must sum to 1, the sum is {sum(weights):.6g}; take them from a decay curve")


def check_same_model(first: WeightFolder, other: WeightFolder) -> None:
    """Equal shape fields, hence equal tensor names and shapes; else a `UserError` that names the first difference."""
    for field in dataclasses.fields(first.config):
        ours, theirs = getattr(first.config, field.name), getattr(other.config, field.name)
        if ours != theirs:
            raise UserError(f"{other.folder}: {field.name} is {theirs}, in {first.folder} it is {ours}; merge checkpoints of one model")


def weighted_sum(tensors: Any, weights: Sequence[float]) -> Tensor:
    """sum_j weights[j] * tensors[j] in float64, taking one tensor at a time from an iterable."""
    total = torch.empty(0)
    for number, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if number == 0:
            total = torch.zeros(tensor.shape, dtype=torch.float64)
        for part, added in zip(total.view(-1).split(CHUNK), tensor.reshape(-1).split(CHUNK), strict=True):
            part.add_(added.double(), alpha=weight)
    return total


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each weight file and index of a folder."""
    return {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.suffix == ".safetensors" or path.name == INDEX}
