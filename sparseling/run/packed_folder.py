"""A model on disk in the form that the engine reads, mapped into memory as it is: nothing is packed or copied at the start.

    write_packed(source, folder, ...); source = open_packed(folder)

config.json, the tokenizer, `packed.json` (version, kind, sizes and hashes) and one data file for the outer parts and each layer, in which
the parts follow one another as `plan_parts` has them: numbers, then scales.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .. import __version__
from ..checkpoint.tensor_files import PACKED
from ..config import ModelConfig
from ..errors import UserError
from ..files import read_json, sha256_of_file, write_json
from ..progress import track
from .memory import fits
from .packed import BITS, BLOCK_ROWS, GROUP_COLUMNS, LARGE_PAGE, Kind, Packed, data_bytes, large_pages, round_up, scale_bytes
from .parts import Part, PartPlan, plan_parts
from .source import Source

MANIFEST = PACKED
VERSION = 1  # of the layout, with csrc/engine/matrix.h: another number, another reader
PAGE_BYTES, SCALES_ALIGNMENT = 4096, 64
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Place:
    """Where a part lies: in `file`, `size` bytes at `offset`, then `scale_size` bytes at `scale_offset`."""

    file: str
    offset: int
    size: int
    scale_offset: int
    scale_size: int

    @property
    def end(self) -> int:
        return self.scale_offset + self.scale_size if self.scale_size else self.offset + self.size


def is_packed(folder: str | Path) -> bool:
    """Whether a folder was written by `write_packed`."""
    return (Path(folder) / MANIFEST).is_file()


def layout(plans: list[PartPlan], embedding: torch.dtype) -> dict[str, Place]:
    """Places of all parts. Each begins at a page of its own, a large one at a large page."""
    places: dict[str, Place] = {}
    ends: dict[str, int] = {}
    for plan in plans:
        file = file_of(plan.name)
        numbers = plan.rows * plan.columns
        if plan.kind is None:
            size, scale_size = numbers * (embedding.itemsize if plan.name == "embedding" else 4), 0
        else:
            numbers = round_up(plan.rows, BLOCK_ROWS) * round_up(plan.columns, GROUP_COLUMNS)
            size, scale_size = data_bytes(plan.kind, numbers), scale_bytes(plan.kind, numbers)
        offset = round_up(ends.get(file, 0), LARGE_PAGE if size >= LARGE_PAGE else PAGE_BYTES)
        places[plan.name] = Place(file, offset, size, round_up(offset + size, SCALES_ALIGNMENT), scale_size)
        ends[file] = places[plan.name].end
    return places


def file_of(part: str) -> str:
    """The data file of a part: its layer's, or that of the outer parts."""
    owner, _, rest = part.partition(".")
    return f"{owner.removesuffix('s')}-{int(rest.split('.')[0]):05d}.packed" if rest else "outer.packed"


def sizes_of(places: dict[str, Place]) -> dict[str, int]:
    """Bytes of each data file."""
    return {place.file: place.end for place in places.values()}  # the last of a file's counts


class HashedFile:
    """A file written from front to end, hashed on the way."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest, self.position = stream, hashlib.sha256(), 0

    def write_at(self, offset: int, tensor: Tensor) -> None:
        """Zeros up to `offset`, then the tensor's bytes."""
        for data in (bytes(offset - self.position), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data):
            self.stream.write(data)
            self.digest.update(data)
            self.position += len(data)


def write_packed(source: Source, embedding: torch.dtype, origin: str, folder: Path) -> None:
    """Data files and `packed.json` into an existing empty folder, one part in memory at a time. `embedding`: its dtype, bfloat16 or
    float32. `origin`: a word on where the weights come from, for people."""
    plans = plan_parts(source.config, source.kind)
    places, parts = layout(plans, embedding), iter(source.parts)
    hashes: dict[str, str] = {}
    for file, its_plans in itertools.groupby(plans, key=lambda plan: file_of(plan.name)):
        with open(folder / file, "wb") as stream:
            hashed = HashedFile(stream)
            for _ in its_plans:
                write_part(hashed, places, *next(parts))  # bound to no name here: it would stay while the next one is made
        hashes[file] = hashed.digest.hexdigest()
    files = {name: {"bytes": size, "sha256": hashes[name]} for name, size in sizes_of(places).items()}
    write_json(folder / MANIFEST, {
        "version": VERSION, "kind": source.kind, "embedding": str(embedding).removeprefix("torch."), "source": origin,
        "written_by": f"sparseling {__version__}", "files": files,
    })


def write_part(file: HashedFile, places: dict[str, Place], name: str, part: Part) -> None:
    place = places[name]
    file.write_at(place.offset, part.data if isinstance(part, Packed) else part)
    if isinstance(part, Packed) and place.scale_size:
        file.write_at(place.scale_offset, part.scales)


@dataclass(frozen=True)
class PackedFolder:
    """A packed folder whose description has been read and checked against its files' sizes; nothing is mapped yet."""

    folder: Path
    config: ModelConfig
    kind: Kind
    embedding: torch.dtype
    hashes: dict[str, str]
    sizes: dict[str, int]

    @property
    def bytes(self) -> int:
        """Of all data files."""
        return sum(self.sizes.values())


def open_packed(folder: str | Path) -> PackedFolder:
    """Raises `UserError`: another version, an unknown kind, a file that is missing or of another size."""
    folder = Path(folder)
    manifest, path = read_json(folder / MANIFEST), folder / MANIFEST
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{path}: is not what sparseling convert writes; convert the model again")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path}: has version {manifest.get('version')!r}, this program reads {VERSION}; convert the model again")
    kind = manifest.get("kind")
    if not isinstance(kind, str) or kind not in BITS:
        raise UserError(f"{path}: weights of kind {kind!r} are not known, only {', '.join(BITS)}; convert the model again")
    if manifest.get("embedding") not in DTYPES:
        raise UserError(f"{path}: an embedding of dtype {manifest.get('embedding')!r} is not known; convert the model again")
    config, embedding = ModelConfig.from_folder(folder), DTYPES[manifest["embedding"]]
    sizes = sizes_of(layout(plan_parts(config, kind), embedding))
    if sizes != {name: entry.get("bytes") if isinstance(entry, dict) else None for name, entry in manifest["files"].items()}:
        raise UserError(f"{path}: its files are not those of a model such as config.json describes; convert the model again")
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            what = "is missing" if there is None else f"has {there:,} bytes instead of {size:,}"
            raise UserError(f"{folder / name}: {what}; copy it again, or convert the model again")
    hashes = {name: str(entry.get("sha256")) for name, entry in manifest["files"].items()}
    return PackedFolder(folder, config, kind, embedding, hashes, sizes)


def check_hashes(packed: PackedFolder) -> None:
    """Read everything once. Raises `UserError` naming a file whose bytes are not those that were written."""
    for name, digest in packed.hashes.items():
        if sha256_of_file(packed.folder / name) != digest:
            raise UserError(f"{packed.folder / name}: its bytes have changed since they were written; copy or convert it again")


def source_of_packed(packed: PackedFolder, preload: bool = False) -> Source:
    """The parts as maps of the files: what a step needs of them is read when it is needed, and shared between processes. With `preload`
    all are read now, into memory of this process. Raises `UserError` for a file that cannot be read."""
    places = layout(plan_parts(packed.config, packed.kind), packed.embedding)
    return Source(packed.config, packed.kind, read_parts(packed, places) if preload else mapped_parts(packed, places))


def mapped_parts(packed: PackedFolder, places: dict[str, Place]) -> Iterator[tuple[str, Part]]:
    large = fits(packed.bytes)
    maps = {name: mapped(packed.folder / name, size, large) for name, size in packed.sizes.items()}
    for plan in plan_parts(packed.config, packed.kind):
        place = places[plan.name]
        data = maps[place.file][place.offset:place.offset + place.size]
        yield plan.name, part_of(plan, packed.embedding, data, maps[place.file][place.scale_offset:place.scale_offset + place.scale_size])


def read_parts(packed: PackedFolder, places: dict[str, Place]) -> Iterator[tuple[str, Part]]:
    for plan in track(plan_parts(packed.config, packed.kind), "reading weights"):
        place = places[plan.name]
        data, scales = large_pages(place.size), large_pages(place.scale_size)
        with open(packed.folder / place.file, "rb", buffering=0) as stream:
            read_into(stream, place.offset, data)
            read_into(stream, place.scale_offset, scales)
        yield plan.name, part_of(plan, packed.embedding, data, scales)


def read_into(stream: FileIO, offset: int, memory: Tensor) -> None:
    """Fill `memory` from `offset` of a file on."""
    stream.seek(offset)
    rest = memory.numpy().data
    while rest:
        count = stream.readinto(rest)
        if not count:
            raise UserError(f"{stream.name}: has become shorter while it was read; copy it again")
        rest = rest[count:]


def part_of(plan: PartPlan, embedding: torch.dtype, data: Tensor, scales: Tensor) -> Part:
    """A part from its bytes."""
    if plan.kind is None:
        return data.view(embedding if plan.name == "embedding" else torch.float32)
    return Packed(plan.kind, plan.rows, plan.columns, data, scales.view(torch.int16))


def mapped(path: Path, size: int, large: bool) -> Tensor:
    """The bytes of a file, read-only, mapped; `large`: read and mapped 2 MiB at a time where the file system can (docs/log.md). A file
    shorter than `size` is refused: reading behind its end would end the program."""
    try:
        with open(path, "rb") as stream:
            memory = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be mapped ({error}); copy it again") from None
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # and nobody writes to it
        return torch.frombuffer(memory, dtype=torch.uint8)


def packed_bytes(config: ModelConfig, kind: Kind, embedding: torch.dtype) -> int:
    """What a packed folder will take on disk, and its weights in memory."""
    return sum(sizes_of(layout(plan_parts(config, kind), embedding)).values())
