"""Public folder to public folder without building the model: other dtype, other shard size, FP8 multiplied out, MTP left out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from .folders import write_folder_aside
from .hf import MAX_SHARD_BYTES, WeightFolder, dtype_entries, open_checkpoint, plan_of, read_checkpoint, with_progress, without_mtp
from .tensor_files import write_shards

# Everything beside the weights that a public repository carries. Scripts are copied as text, never run.
COMPANION_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".md")


def convert_folder(
    source: str | Path, target: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES, mtp: bool = True,
    overwrite: bool = False,
) -> None:
    """Rewrite a public folder, one tensor in memory at a time. Names, layer numbers and the keys of config.json stay as they are.

    dtype: bfloat16 or float32 (None: as stored; an FP8 checkpoint becomes what its embedding is). `mtp=False` leaves MTP layers out.
    Raises `UserError` as `open_checkpoint` and `save_model` do.
    """
    checkpoint = open_checkpoint(source)
    if not mtp:
        checkpoint = without_mtp(checkpoint)
    dtype = dtype or checkpoint.dtype
    plan = plan_of(checkpoint.config, dtype)
    with write_folder_aside(target, overwrite, needed_bytes=sum(tensor.size_bytes for tensor in plan.values())) as aside:
        tensors = read_checkpoint(checkpoint, fp8_to=dtype)
        write_shards(aside, plan, with_progress(tensors, "converting", checkpoint), max_shard_bytes)
        copy_companions(checkpoint.folder, aside)
        write_json(aside / "config.json", public_config(checkpoint, dtype))


def public_config(checkpoint: WeightFolder, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the source with the dtype that is written now, no FP8, and the layers that are there."""
    public = {key: value for key, value in checkpoint.public.items() if key not in ("quantization_config", "dtype")}
    if not checkpoint.config.num_nextn_predict_layers:
        public.pop("num_nextn_predict_layers", None)
        public["num_hidden_layers"] = checkpoint.config.num_hidden_layers
    return public | dtype_entries(dtype)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config, licence and the like; not weights, not their index, not config.json."""
    for path in sorted(source.iterdir()):
        wanted = path.suffix in COMPANION_SUFFIXES or path.name in ("LICENSE", "NOTICE")
        ours = path.name in ("config.json", "merge.json") or path.name.endswith(".safetensors.index.json")
        if path.is_file() and wanted and not ours:
            shutil.copyfile(path, target / path.name)
