"""Weights in the form that the engine reads: blocks of 16 rows, in fp32, bf16, int8 or int4 (csrc/engine/matrix.h)."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.library import call

Kind = Literal["fp32", "bf16", "int8", "int4"]
CODES: dict[Kind, int] = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}
BITS: dict[Kind, int] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4}
BLOCK_ROWS, GROUP_COLUMNS = 16, 32
LARGE_PAGE = 1 << 21


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix [rows, columns], filled up with zeros to whole blocks and groups. `scales`: fp16 bits, one a row and group of 32 columns,
    for int8 and int4; else empty."""

    kind: Kind
    rows: int
    columns: int
    data: Tensor
    scales: Tensor

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns with the zeros."""
        return round_up(self.rows, BLOCK_ROWS), round_up(self.columns, GROUP_COLUMNS)

    @property
    def bytes(self) -> int:
        """Of numbers and scales."""
        return self.data.numel() + 2 * self.scales.numel()


def round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def pack(weight: Tensor, kind: Kind) -> Packed:
    """weight [rows, columns] in fp32 or bf16. int8: the largest value of a group is 127; int4: the grid with the least squared error."""
    packed = empty_packed(kind, weight.shape[0], weight.shape[1])
    pack_into(packed, weight)
    return packed


def empty_packed(kind: Kind, rows: int, columns: int) -> Packed:
    """Memory for a matrix [rows, columns]; `pack_into` fills it."""
    numbers = round_up(rows, BLOCK_ROWS) * round_up(columns, GROUP_COLUMNS)
    return Packed(kind, rows, columns, large_pages(data_bytes(kind, numbers)), large_pages(scale_bytes(kind, numbers)).view(torch.int16))


def data_bytes(kind: Kind, numbers: int) -> int:
    """Of so many numbers, whole blocks of them."""
    return numbers * BITS[kind] // 8


def scale_bytes(kind: Kind, numbers: int) -> int:
    """Of their scales."""
    return 2 * numbers // GROUP_COLUMNS if kind in ("int8", "int4") else 0


def pack_into(packed: Packed, weight: Tensor, first_block: int = 0, step: int = 1) -> None:
    """Put weight [rows, columns] into every `step`th block of 16 rows from `first_block` on. Raises `ValueError` if it does not fit."""
    weight = weight.detach().contiguous()
    weight = weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
    rows, columns = packed.padded
    blocks = -(-weight.shape[0] // BLOCK_ROWS)
    if weight.shape[1] != packed.columns or not 0 <= first_block <= rows // BLOCK_ROWS - 1 - (blocks - 1) * step:
        raise ValueError(f"a matrix {list(weight.shape)} does not fit into {[packed.rows, packed.columns]} from block {first_block} on")
    numbers = first_block * BLOCK_ROWS * columns
    data, scales = packed.data[data_bytes(packed.kind, numbers):], packed.scales[scale_bytes(packed.kind, numbers) // 2:]
    source = int(weight.dtype == torch.bfloat16)
    call("engine_pack", torch.get_num_threads(), CODES[packed.kind], *weight.shape, columns, step, source, weight, data, scales)


def large_pages(size: int) -> Tensor:
    """`size` bytes of zeros, uint8, in pages of 2 MiB where the system gives them: experts lie far apart, and finding their pages in memory
    takes as long as reading them (docs/log.md). Those never written to take no memory."""
    if size < LARGE_PAGE:
        return torch.zeros(size, dtype=torch.uint8)
    # private: what can be shared with another process is not given large pages unless the system's settings say so
    memory = mmap.mmap(-1, size + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % LARGE_PAGE
    return whole[start:start + size]


def unpack(packed: Packed) -> Tensor:
    """fp32 [rows, columns], as products see it."""
    out = torch.empty(packed.padded, dtype=torch.float32)
    call("engine_unpack", torch.get_num_threads(), CODES[packed.kind], *packed.padded, packed.data, packed.scales, out)
    return out[:packed.rows, :packed.columns]
