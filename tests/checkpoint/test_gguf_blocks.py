"""Our blocks against those of the package gguf, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseling.checkpoint.gguf_blocks import quantize

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra [gguf])")
KINDS = ["Q8_0", "Q4_0"]


def same(matrix: Tensor, kind: str) -> bool:
    theirs = gguf.quantize(matrix.float().numpy(), gguf.GGMLQuantizationType[kind])
    return bool(np.array_equal(quantize(matrix, kind).numpy().reshape(-1), theirs.reshape(-1)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-9, 0.02, 300.0])
def test_random_matrices(kind: str, dtype: torch.dtype, scale: float) -> None:
    matrix = (torch.randn(300, 96, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    assert same(matrix, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_halves_and_equal_magnitudes(kind: str) -> None:
    rows = [torch.zeros(32), torch.arange(32) - 15.5, torch.tensor([1.0, -1.0] * 16), torch.tensor([-1.0, 1.0] * 16)]
    rows += [torch.full((32,), -0.0), torch.arange(32) / 254 * 127, torch.cat([torch.tensor([127.0]), torch.arange(31) + 0.5])]
    assert same(torch.stack([row.float() for row in rows]), kind)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.floats(-60000, 60000, width=32), min_size=32, max_size=32))
def test_any_block(kind: str, values: list[float]) -> None:
    assert same(torch.tensor([values], dtype=torch.float32), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_several_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    whole = quantize(matrix, kind)
    monkeypatch.setattr("sparseling.checkpoint.gguf_blocks.ROWS_BYTES", 7 * 128)
    assert torch.equal(quantize(matrix, kind), whole)
