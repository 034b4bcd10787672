"""What only a whole process shows: its memory, the libraries in it, and whether it survives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sparseling.kernels.library import load_library

OPENMP_FILES = r"""
import re
from pathlib import Path
import torch

def openmp_files() -> set[str]:
    return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if re.search(r"/lib[gi]?omp[^/]*$", line)}

torch.ones(300, 300) @ torch.ones(300, 300)
before = openmp_files()
from sparseling.kernels.linear import linear
linear(torch.ones(300, 300), torch.ones(300, 300)).sum()
assert before and openmp_files() == before, (before, openmp_files())
"""

MEMORY = r"""
import re
from pathlib import Path
import torch
from sparseling.kernels.cross_entropy import cross_entropy_sum

def peak_bytes() -> int:
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

def step(tokens: int) -> None:
    hidden, head = torch.randn(tokens, 32, dtype=DTYPE, requires_grad=True), torch.randn(20000, 32, requires_grad=True)
    cross_entropy_sum(hidden, head, torch.randint(0, 20000, (tokens,))).backward()

step(1)
before = peak_bytes()
step(10000)
assert peak_bytes() - before < 160e6, peak_bytes() - before
"""

INTEGER_EPS = """
import torch
from sparseling.kernels.norm import rms_norm
x, weight = torch.randn(4, 33), torch.ones(33)
assert torch.equal(rms_norm(x, weight, 1), rms_norm(x, weight, 1.0))
"""

# every case in a process of its own: what is not refused reads or writes past the end of a tensor
MISMATCHES = """
import os
import signal
import torch
from torch import ones, zeros
from sparseling.kernels.attention import attention
from sparseling.kernels.choose import forced_path
from sparseling.kernels.cross_entropy import cross_entropy_sum
from sparseling.kernels.experts import experts, swiglu
from sparseling.kernels.linear import linear
from sparseling.kernels.norm import rms_norm
from sparseling.kernels.query_key_value import query_key_value

def ids(*shape):
    return zeros(*shape, dtype=torch.int64)

CASES = {
    "linear, narrow weight": lambda: linear(ones(9, 64), ones(8, 20)),
    "linear, wide weight": lambda: linear(ones(9, 20), ones(8, 30)),
    "swiglu, narrow up": lambda: swiglu(ones(9, 64), ones(20, 64), ones(20, 32), ones(64, 20)),
    "swiglu, narrow down": lambda: swiglu(ones(9, 64), ones(90, 64), ones(90, 64), ones(64, 20)),
    "experts, more ids than tokens": lambda: experts(ones(5, 64), ids(900, 1), ones(900, 1), ones(2, 64, 64), ones(2, 64, 32)),
    "experts, fewer weights than ids": lambda: experts(ones(5, 64), ids(5, 9), ones(5, 1), ones(2, 64, 64), ones(2, 64, 32)),
    "experts, narrow gate": lambda: experts(ones(5, 64), ids(5, 1), ones(5, 1), ones(2, 64, 32), ones(2, 64, 32)),
    "experts, narrow down": lambda: experts(ones(5, 64), ids(5, 1), ones(5, 1), ones(2, 128, 64), ones(2, 64, 32)),
    "experts, few down": lambda: experts(ones(5, 64), ids(5, 1) + 1, ones(5, 1), ones(2, 64, 64), ones(1, 64, 32)),
    "cross entropy, few labels": lambda: cross_entropy_sum(ones(900, 64), ones(9, 64), ids(3)),
    "cross entropy, many labels": lambda: cross_entropy_sum(ones(5, 64), ones(9, 64), ids(7)),
    "cross entropy, narrow head": lambda: cross_entropy_sum(ones(5, 64), ones(9, 20), ids(5)),
    "attention, heads that do not divide": lambda: attention(ones(1, 3, 5, 32), ones(1, 2, 5, 32), ones(1, 2, 5, 32)),
    "attention, fewer values than keys": lambda: attention(ones(1, 2, 50, 32), ones(1, 2, 50, 32), ones(1, 2, 4, 32)),
    "attention, narrow keys": lambda: attention(ones(1, 2, 5, 64), ones(1, 2, 5, 32), ones(1, 2, 5, 64)),
    "attention, smaller batch of keys": lambda: attention(ones(3, 2, 5, 32), ones(2, 2, 5, 32), ones(2, 2, 5, 32)),
    "attention, few document starts": lambda: attention(ones(2, 2, 50, 32), ones(2, 2, 50, 32), ones(2, 2, 50, 32), None, ids(2, 3)),
    "norm, short weight": lambda: rms_norm(ones(2, 64), ones(20), 1e-6),
    "norm, long weight": lambda: rms_norm(ones(2, 20), ones(64), 1e-6),
    "query key value, short norm": lambda: query_key_value(ones(2, 3, 256), 2, 1, (ones(20), ones(20)), *[ones(2, 3, 8)] * 2, 1e-6),
    "query key value, short sine": lambda: query_key_value(ones(2, 3, 256), 2, 1, None, ones(2, 3, 8), ones(2, 3, 4), 1e-6),
    "query key value, rotation wider than a head": lambda: query_key_value(ones(2, 3, 80), 2, 1, None, *[ones(2, 3, 90)] * 2, 1e-6),
}

def refused(case):
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # broken memory may also hang
        try:
            with forced_path(PATH):
                case()
        except Exception:
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

torch.set_num_threads(1)
taken = [name for name, case in CASES.items() if not refused(case)]
assert not taken, taken
"""

EMPTY_BATCH = """
import torch
from sparseling.kernels.attention import attention
q, k, v = (torch.zeros(0, heads, 5, 32, requires_grad=True) for heads in (4, 2, 2))
y = attention(q, k, v)
assert y.shape == q.shape
y.sum().backward()
"""

LABEL_TYPE = """
import torch
from sparseling.kernels.cross_entropy import cross_entropy_sum
hidden, head, labels = torch.randn(30, 20), torch.randn(40, 20), torch.arange(30)
want = cross_entropy_sum(hidden, head, labels)
try:
    got = cross_entropy_sum(hidden, head, labels.int())
except (TypeError, RuntimeError):
    raise SystemExit(0)
assert torch.equal(got, want), (got, want)
"""


def run(code: str) -> None:
    """`code` in a fresh Python process, which must end well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"


def needs_kernels() -> None:
    if load_library()[0] is None:
        pytest.skip(load_library()[1])


def test_the_kernels_bring_no_second_openmp_runtime() -> None:
    needs_kernels()
    run(OPENMP_FILES)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_the_memory_of_cross_entropy_does_not_grow_with_tokens_times_vocabulary(dtype: str) -> None:
    needs_kernels()
    run(MEMORY.replace("DTYPE", dtype))  # all logits: 800 or 400 million bytes


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_shapes_that_do_not_fit_are_refused(path: str) -> None:
    run(MISMATCHES.replace("PATH", repr(path)))


def test_a_whole_number_is_an_eps() -> None:
    run(INTEGER_EPS)


def test_attention_of_an_empty_batch_is_empty() -> None:
    run(EMPTY_BATCH)


def test_labels_of_another_integer_type_are_understood_or_refused() -> None:
    run(LABEL_TYPE)
