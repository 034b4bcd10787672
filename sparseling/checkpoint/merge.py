"""WSM: warm-up, stable learning rate, and merging instead of decay (WSM §3; L2 §3.2.3).

A weighted mean of checkpoints of a constant-rate run equals one run whose updates were decayed: with g_i the update between checkpoint
i - 1 and i, sum_j c_j theta_j = theta_0 - sum_i w_i g_i where w_i = c_i + ... + c_k. So any decay curve gives merge weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import UserError, nearest
from ..files import sha256_of_file, write_json
from ..progress import track
from .convert import copy_companions, public_config
from .folders import write_folder_aside
from .hf import MAX_SHARD_BYTES, WeightFolder, open_checkpoint, plan_of, read_checkpoint
from .tensor_files import INDEX, write_shards

K = TypeVar("K")
# Learning rate left after the share t of the window (WSM Fig. 2).
CURVES = {
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: (1.0 + math.cos(math.pi * t)) / 2.0,
    "1-sqrt": lambda t: 1.0 - math.sqrt(t),
    "ema": lambda t: 1.0 - 0.1 ** (1.0 - t),
}
CHUNK = 1 << 20  # elements added at a time: bounds the float64 copies


def merge_weights(curve: str | Sequence[float], checkpoints: int) -> list[float]:
    """Weights c_0..c_k of `checkpoints` = k + 1 checkpoints, oldest first; they are >= 0 and sum to 1 (WSM Theorem 3.1).

    curve: 'mean', 'linear', 'cosine', '1-sqrt', 'ema' (sampled at i / (k + 1), i = 1..k), or the k decay factors w_1 >= ... >= w_k
    themselves, within [0, 1]. Then c_k = w_k, c_j = w_j - w_(j+1), c_0 = 1 - w_1. 'mean' equals 'linear'.
    Raises `UserError` for an unknown curve, a wrong number of factors, or factors that rise or leave [0, 1].
    """
    if checkpoints < 1:
        raise UserError(f"checkpoints: {checkpoints} cannot be merged; give at least one")
    if curve == "mean":
        return [1.0 / checkpoints] * checkpoints
    if isinstance(curve, str):
        if curve not in CURVES:
            raise UserError(f"curve: '{curve}' is unknown; {nearest(curve, ['mean', *CURVES])}")
        decay = [CURVES[curve](i / checkpoints) for i in range(1, checkpoints)]
    else:
        decay = check_decay(curve, checkpoints)
    steps = [1.0, *decay, 0.0]
    return [before - after for before, after in itertools.pairwise(steps)]


def check_decay(curve: Sequence[float], checkpoints: int) -> list[float]:
    """The k factors of a custom curve as floats, or a `UserError` that says which one is wrong."""
    if len(curve) != checkpoints - 1:
        raise UserError(f"curve: has {len(curve)} factors, {checkpoints} checkpoints need {checkpoints - 1}, one per update between them")
    decay = [float(factor) for factor in curve]
    for number, (before, factor) in enumerate(itertools.pairwise([1.0, *decay]), start=1):
        if not 0.0 <= factor <= before:  # false for NaN too
            raise UserError(f"curve: factor {number} is {factor}, expected a number from 0 to {before}; a decay curve falls from 1 to 0")
    return decay


def choose_top(scores: Mapping[K, float], count: int) -> list[K]:
    """The `count` checkpoints with the lowest validation bits per byte, in the order of `scores` (time order). All when there are fewer.

    L2 §3.2.3 merges the top 32 of late mid-training. Of equal scores the later wins; NaN (a diverged checkpoint) is never chosen.
    """
    if count < 1:
        raise UserError(f"top: {count} checkpoints cannot be merged; choose at least 1")
    order = {checkpoint: number for number, checkpoint in enumerate(scores)}
    usable = [checkpoint for checkpoint, score in scores.items() if math.isfinite(score)]
    if not usable:
        raise UserError("top: no checkpoint has a finite validation score; look at the loss curve of the run")
    best = sorted(usable, key=lambda checkpoint: (scores[checkpoint], -order[checkpoint]))[:count]
    return sorted(best, key=order.__getitem__)


def merge_folders(
    folders: Sequence[str | Path], weights: Sequence[float], out: str | Path, dtype: torch.dtype | None = None, overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES, provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write sum_j weights[j] * folders[j] as a public folder, tensor by tensor, accumulated in float64.

    Sharding and dtype of the sources may differ, their shapes may not. expert_bias is merged too and stays float32. dtype None: as the
    last source. Tokenizer and config come from the last source. `merge.json` records weights, sources, SHA-256 of every weight
    file read and written, and the entries of `provenance`. Raises `UserError` naming the first difference between two sources.
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
        write_json(aside / "merge.json", record | dict(provenance or {}))


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
