"""Builds the CPU kernels (csrc/): one plain C library an instruction set, chosen at run time by sparseling/kernels/library.py.

They need GCC with OpenMP and nothing else: no torch headers, and no OpenMP runtime of their own. The OpenMP calls are left
open at link time and meet the runtime that torch has loaded. A variant that does not build is left out: sparseling then runs in plain
PyTorch, slower.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup

VARIANTS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"],
    "avx512_bf16": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16"],
}


def variant(name: str, flags: list[str]) -> Extension:
    headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))
    return Extension(f"sparseling.kernels._cpu_{name}", [f"csrc/cpu_{name}.cpp"], depends=headers, language="c++", optional=True,
                     extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno",
                                         "-fno-strict-aliasing", "-pthread", *flags], extra_link_args=["-pthread"])


linux_x86 = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
setup(ext_modules=[variant(name, flags) for name, flags in VARIANTS.items()] if linux_x86 else [])
