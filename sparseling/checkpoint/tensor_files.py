"""Folders of safetensors files: what is in them, reading one tensor at a time, writing shards one tensor at a time.

Nothing here knows the model. Pickle files (`*.bin`, `*.pt`) are never opened: opening one can run its author's code.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PACKED = "packed.json"  # what tells a folder of packed weights (run/packed_folder.py)
# Little-endian on disk. Anything else (integers, packed 4 bit) is no weight of these models.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, its name there, shape and dtype on disk."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorPlan:
    """Shape and dtype of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def list_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder by name, shard by shard in file order, from the headers alone.

    Raises `UserError` naming the file when the folder holds no safetensors, or the index or a shard is missing, broken or cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder with config.json and safetensors files")
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        weight_map = read_index(index)
        if single.exists() and SINGLE not in weight_map.values():
            raise UserError(f"{folder}: holds both {SINGLE} and {INDEX}, which does not list it; remove the one that is out of date")
        return list_shards(folder, weight_map)
    if single.exists():
        return list_file(single)
    if (folder / PACKED).exists():
        raise UserError(f"{folder}: is packed for the native engine, which alone can read it; give the model that it came from")
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise UserError(f"{folder}: has only pickle weights ({pickles[0]}), which are never opened because they can run code; "
                        "convert them to safetensors")
    raise UserError(f"{folder}: has neither {SINGLE} nor {INDEX}; download the weights again")


def read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard file name. A shard must lie beside its index: names with a folder in them are refused."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{path}: has no weight_map from tensor names to files; download the file again")
    for shard in sorted(set(weight_map.values())):
        if shard != os.path.basename(shard) or "\\" in shard or not shard.endswith(".safetensors"):
            raise UserError(f"{path}: lists '{shard}', which is not a safetensors file of the same folder; do not use this checkpoint")
    return weight_map


def list_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors that the index lists, each in the shard that the index names."""
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).exists()]
    if missing:
        raise UserError(f"{folder / missing[0]}: {len(missing)} of {len(shards)} shard files are missing; download the model again")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        stored = list_file(folder / shard)
        listed = {name for name, file in weight_map.items() if file == shard}
        absent = sorted(listed - stored.keys())
        if absent:
            raise UserError(f"{folder / shard}: lacks {absent[0]} and {len(absent) - 1} more tensors that {INDEX} lists there; "
                            "download both files again")
        tensors |= {name: tensor for name, tensor in stored.items() if name in listed}
    return tensors


def open_file(path: Path) -> Any:
    """A safetensors file, read with pread: a map of the file would count every page read as this program's memory."""
    try:
        return safe_open(path, framework="pt", backend="pread")
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); download or write the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def list_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file in the order of their bytes."""
    tensors = {}
    with open_file(path) as file:
        for name in file.offset_keys():
            header = file.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise UserError(f"{path}: {name} is stored as {header.get_dtype()}, known are {', '.join(DTYPES)}; convert the model first")
            tensors[name] = StoredTensor(path, name, tuple(header.get_shape()), DTYPES[header.get_dtype()])
    return tensors


def read_stored(tensors: Iterable[StoredTensor]) -> Iterator[Tensor]:
    """The tensors one by one, in the order given. One file is open at a time and one tensor is in memory."""
    path: Path | None = None
    file: Any = None
    for stored in tensors:
        if stored.file != path:
            path, file = stored.file, open_file(stored.file)
        try:
            yield file.get_tensor(stored.name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {stored.name} cannot be read ({error}); download or write the file again") from None


def plan_shards(plan: Mapping[str, TensorPlan], max_shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order: a new shard starts when the next tensor would pass `max_shard_bytes` (of tensor data)."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in plan.items():
        if not shards or tensor.size_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= tensor.size_bytes
    return shards


def shard_layout(names: Iterable[str], plan: Mapping[str, TensorPlan]) -> tuple[bytes, dict[str, int], int]:
    """(header, byte offset of each tensor in the file, file size) as the safetensors library lays a file out.

    Wider dtypes first, then by name: every tensor is aligned to its element, and equal tensors give equal bytes.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, position = {}, 0
    for name in sorted(names, key=lambda name: (-plan[name].dtype.itemsize, name)):
        tensor = plan[name]
        starts[name] = position
        position += tensor.size_bytes
        entries[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [starts[name], position]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + position


def write_shards(folder: Path, plan: Mapping[str, TensorPlan], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write `tensors` (any order, any float dtype) as the shards and index that `plan` describes. `folder` is new and empty.

    Each tensor goes straight to its place in its shard, so one tensor is in memory. A tensor that the plan lacks, comes twice, has
    another shape, or never comes is a `UserError` that names it.
    """
    shards = plan_shards(plan, max_shard_bytes)
    places: dict[str, tuple[Path, int]] = {}
    for number, names in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offsets, size_bytes = shard_layout(names, plan)
        with open(path, "wb") as stream:
            stream.write(header)
            stream.truncate(size_bytes)
        places |= {name: (path, offset) for name, offset in offsets.items()}
    write_index(folder / INDEX, plan, places)
    waiting = dict(plan)
    for name, tensor in tensors:
        if name not in waiting:
            raise UserError(f"{name}: {'comes twice' if name in plan else 'is no tensor of this model'}; check where the weights come from")
        if tuple(tensor.shape) != waiting[name].shape:
            raise UserError(f"{name}: has shape {list(tensor.shape)}, expected {list(waiting[name].shape)}; "
                            "check that weights and config belong together")
        path, offset = places[name]
        write_tensor(path, offset, tensor.detach().to("cpu", waiting.pop(name).dtype))
        del tensor  # or it would stay while the next one is made
    if waiting:
        raise UserError(f"{next(iter(waiting))}: missing, with {len(waiting) - 1} more tensors; check where the weights come from")


def write_tensor(path: Path, offset: int, tensor: Tensor) -> None:
    """Put the bytes of a CPU tensor at `offset` of an existing file."""
    with open(path, "rb+") as stream:
        stream.seek(offset)
        stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_index(path: Path, plan: Mapping[str, TensorPlan], places: Mapping[str, tuple[Path, int]]) -> None:
    """The index as Hugging Face tools write it: sorted, `total_size` in bytes of tensor data."""
    total_bytes = sum(tensor.size_bytes for tensor in plan.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": {name: file.name for name, (file, _) in places.items()}}
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(index, indent=2, sort_keys=True) + "\n")
