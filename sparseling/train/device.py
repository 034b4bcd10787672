"""The device that a training run uses: finding it, its memory, waiting for it, one order of adding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UserError

CAPABILITY = (8, 0)


def training_device(wanted: str) -> str:
    """`wanted`, "cpu" or "cuda", if it is there. Raises `UserError` for a GPU that is not, or is too old."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device: this machine has no CUDA device that torch can use; set it to cpu")
    if wanted == "cuda" and torch.cuda.get_device_capability() < CAPABILITY:
        raise UserError(f"device: {torch.cuda.get_device_name()} is too old for bf16 products and flash attention, which need compute "
                        "capability 8.0 (Ampere) or later; set it to cpu")
    return wanted


@contextmanager
def one_order_of_adding(device: str) -> Iterator[None]:
    """Have PyTorch's operations on a GPU add in one order within the block, flash attention's backward above all. Not all of the way to a
    resumed run with the same bits: compiled functions may differ (docs/benchmarks.md). To be entered before the process's first product."""
    if device == "cpu":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; it reads it once
    debugging: Any = torch.utils.deterministic
    before, filling = torch.are_deterministic_algorithms_enabled(), debugging.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    debugging.fill_uninitialized_memory = False  # NaN into new memory costs time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        debugging.fill_uninitialized_memory = filling


def memory_bytes(device: str) -> int:
    """Of a GPU, or of the machine."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def wait_for_device() -> None:
    """Until a GPU that is in use has done what it was told; calls to it return before."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
