"""The matmul peak of this machine: the ceiling that achieved FLOP/s are a share of."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .device import wait_for_device

SIZES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 256, 512))  # rows, inner, columns
CUDA_SIZES = ((8192, 8192, 8192), (16384, 4096, 4096))
SECONDS = 0.25


def matmul_peak(dtype: torch.dtype, device: str = "cpu", seconds: float = SECONDS) -> float:
    """FLOP/s of the fastest matrix product of `SIZES` in `dtype` on a device, by torch.mm or straight through oneDNN, at torch's threads.

    `seconds`: for each size and way to multiply.
    """
    best = 0.0
    for rows, inner, columns in SIZES if device == "cpu" else CUDA_SIZES:
        a, b = (torch.randn(n, inner, device=device).to(dtype) for n in (rows, columns))
        out = torch.empty(rows, columns, dtype=dtype, device=device)
        for product in ways_to_multiply(a, b, out):
            best = max(best, 2 * rows * inner * columns / fastest(product, seconds))
    return best


def ways_to_multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> list[Callable[[], object]]:
    """Products of a [rows, inner] and b [columns, inner] that this torch offers; those that do not run are left out."""
    plain = b.t().contiguous()
    ways: list[Callable[[], object]] = [
        lambda: torch.mm(a, plain, out=out),
        lambda: torch.mm(a, b.t(), out=out),
        lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""),
    ]
    return [way for way in ways if runs(way)]


def runs(function: Callable[[], object]) -> bool:
    try:
        function()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def fastest(function: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call within `seconds`, to the end of its work on the device; there is at least one."""
    best, start = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        function()
        wait_for_device()
        best = min(best, time.perf_counter() - before)
    return best
