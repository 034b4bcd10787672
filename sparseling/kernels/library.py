"""The C++ kernels of `csrc/`: finding the variant for this CPU, loading it, calling it.

Every variant is a plain C library. Its OpenMP calls meet the runtime that torch has loaded; there is no second one.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

# best first; the CPU flags (names of /proc/cpuinfo) that each needs
VARIANTS = {
    "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16", "fma", "f16c", "avx2"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma", "f16c", "avx2"},
    "avx2": {"avx2", "f16c", "fma"},
}
VARIANT_KEY = "SPARSELING_CPU_KERNELS"
# Whose cores multiply bf16 at half the speed of fp32 (AVX-512; measured on Emerald Rapids, docs/log.md): not chosen unless named.
SLOW_BF16_VENDORS = {"GenuineIntel"}
INTERFACE = 7  # of the functions in csrc/library.h, which has the same number: raise both when arguments change
MULTIPLE = 32  # the kernels vectorise over sizes that are multiples of this; others are padded with zeros
CODES = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True)
class Library:
    """A loaded variant. `multiplies_bf16`: whether bf16 operands are multiplied as such (else they are widened to fp32 first)."""

    variant: str
    handle: ctypes.CDLL
    multiplies_bf16: bool


@cache
def load_library() -> tuple[Library | None, str]:
    """The best variant that this CPU runs and that was built, or None; and why, in a few words.

    The environment variable SPARSELING_CPU_KERNELS names another variant, or "none"; avx512_bf16 must be named on CPUs that multiply bf16
    slowly. Raises `UserError` for an unknown name.
    """
    wanted = os.environ.get(VARIANT_KEY, "")
    if wanted not in ("", "none", *VARIANTS):
        raise UserError(f"{VARIANT_KEY}: '{wanted}' is not a variant; use one of {', '.join(VARIANTS)}, none")
    if wanted == "none":
        return None, f"{VARIANT_KEY} is none"
    vendor, flags = cpu_vendor(), cpu_flags()
    reasons = []
    for variant, needed in VARIANTS.items():
        if wanted not in ("", variant) or (not wanted and variant == "avx512_bf16" and vendor in SLOW_BF16_VENDORS):
            continue
        if not needed <= flags:
            reasons.append(f"this CPU lacks {', '.join(sorted(needed - flags))}")
            continue
        path = built_file(variant)
        if path is None:
            reasons.append(f"the C++ kernels ({variant}) were not built: was there a C++ compiler when sparseling was installed?")
            continue
        try:
            handle = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
        except OSError as error:
            reasons.append(f"{path.name} does not load: {error}")
            continue
        if interface_of(handle) != INTERFACE:
            reasons.append(f"{path.name} was built from other sources than these: install sparseling again")
            continue
        handle.sparseling_has_bf16.restype = ctypes.c_int64
        return Library(variant, handle, bool(handle.sparseling_has_bf16())), f"C++ kernels, {variant}"
    return None, reasons[0] if reasons else "no variant for this CPU"


def interface_of(handle: ctypes.CDLL) -> int:
    """Its interface number; 0 for a library from before there was one."""
    if not hasattr(handle, "sparseling_interface"):
        return 0
    handle.sparseling_interface.restype = ctypes.c_int64
    return int(handle.sparseling_interface())


def cpu_flags() -> set[str]:
    """Instruction sets of this CPU as Linux names them; empty where there is no /proc/cpuinfo."""
    return set(cpu_info("flags").split())


def cpu_vendor() -> str:
    """"GenuineIntel", "AuthenticAMD" or another; empty where there is no /proc/cpuinfo."""
    return cpu_info("vendor_id")


def cpu_info(key: str) -> str:
    """What /proc/cpuinfo says of the first core under `key`; empty for nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def built_file(variant: str) -> Path | None:
    """The library file of a variant beside this module."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_{variant}{suffix}")
        if path.exists():
            return path
    return None


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call `sparseling_<function>`: tensors as pointers to their first element, integers as int64, floats as float, None as null."""
    library, reason = load_library()
    assert library is not None, reason
    getattr(library.handle, "sparseling_" + function)(*map(to_c, arguments))


def to_c(argument: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_void_p(0) if argument is None else ctypes.c_int64(argument)


def common(*tensors: Tensor) -> tuple[int, ...]:
    """What a function of activations takes first: the codes of the given tensors' dtypes, and the number of threads."""
    return (*(CODES[t.dtype] for t in tensors), torch.get_num_threads())


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the kernels multiply activations of this dtype in."""
    library, reason = load_library()
    assert library is not None, reason
    return torch.bfloat16 if x.dtype == torch.bfloat16 and library.multiplies_bf16 else torch.float32


def as_weights(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Weights in the one dtype that goes with activations `x`: fp32 with either, bf16 with bf16 only."""
    if x.dtype == torch.bfloat16 and all(weight.dtype == torch.bfloat16 for weight in weights):
        return weights
    return tuple(weight.float() for weight in weights)


def require(fits: bool, *tensors: Tensor | None) -> None:
    """Refuse shapes that do not fit together: the C++ reads and writes memory without looking. Raises `ValueError`."""
    if not fits:
        raise ValueError(f"shapes {', '.join(str(list(t.shape)) for t in tensors if t is not None)} do not fit together")


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow. To be asked outside an autograd.Function: inside, gradients are always off."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def pad(x: Tensor, *dims: int) -> Tensor:
    """x with zeros behind, so that its size in `dims` is a multiple of 32; contiguous."""
    for dim in dims:
        if short := -x.shape[dim] % MULTIPLE:
            x = F.pad(x, [0, 0] * (-dim - 1 if dim < 0 else x.dim() - 1 - dim) + [0, short])
    return x.contiguous()
