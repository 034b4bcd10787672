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
    weight = weight.detach().contiguous()
    weight = weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
    rows, columns = round_up(weight.shape[0], BLOCK_ROWS), round_up(weight.shape[1], GROUP_COLUMNS)
    data = large_pages(rows * columns * BITS[kind] // 8)
    scales = large_pages(2 * rows * columns // GROUP_COLUMNS if kind in ("int8", "int4") else 0).view(torch.int16)
    source = int(weight.dtype == torch.bfloat16)
    call("engine_pack", torch.get_num_threads(), CODES[kind], *weight.shape, rows, columns, source, weight, data, scales)
    return Packed(kind, weight.shape[0], weight.shape[1], data, scales)


def large_pages(size: int) -> Tensor:
    """`size` bytes, uint8, in pages of 2 MiB where the system gives them: experts lie far apart, and finding their pages in memory takes as
    long as reading them (docs/log.md)."""
    if size < LARGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + LARGE_PAGE)
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


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., width, hidden] -> [..., 2 * width, hidden]: 16 rows of gate, the same 16 of up, and so on."""
    *outer, width, hidden = gate.shape
    both = torch.stack([t.reshape(*outer, width // BLOCK_ROWS, BLOCK_ROWS, hidden) for t in (gate, up)], dim=-3)
    return both.reshape(*outer, 2 * width, hidden)
