"""Which code runs an operation: the one place where that is decided, at call time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from .library import CODES, load_library

Path = Literal["cpu", "cuda", "torch", "reference"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by their names in recipes and options
_forced: ContextVar[Path | None] = ContextVar("forced path", default=None)


def path_for(x: Tensor) -> Path:
    """"cpu": the C++ kernels, for fp32 and bf16 tensors of a CPU that has them. "torch": PyTorch
    operations, everywhere else. "cuda": the same dtypes on a CUDA device."""
    forced = _forced.get()
    if forced in ("torch", "reference"):
        return forced
    if x.is_cuda:
        return "cuda" if x.dtype in CODES else "torch"
    return "cpu" if x.device.type == "cpu" and x.dtype in CODES and load_library()[0] is not None else "torch"


@contextmanager
def forced_path(path: Path) -> Iterator[None]:
    """Use one path within the block, where it can run: what benchmarks and tests compare. "reference" is the definition, slow."""
    before = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(before)


def default_training_dtype(device: str = "cpu") -> torch.dtype:
    """bf16 on a GPU and for a CPU variant that multiplies it (not taken by itself where fp32 is faster); fp32 elsewhere."""
    if device != "cpu":
        return torch.bfloat16
    library, _ = load_library()
    return torch.bfloat16 if library is not None and library.multiplies_bf16 else torch.float32


def describe(device: str = "cpu") -> str:
    """Which path tensors of a device take, and why: one line for people."""
    if device != "cpu":
        return f"PyTorch's grouped products and flash attention in bf16, Triton and compiled kernels; {torch.cuda.get_device_name(device)}"
    library, reason = load_library()
    if library is None:
        return f"plain PyTorch, slower ({reason})"
    return f"{reason}, {torch.get_num_threads()} threads"
