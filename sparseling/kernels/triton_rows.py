"""Triton kernels between the grouped products of experts: SwiGLU forward and backward, and the sum of each token's slots.

The compiler of `torch.compile` makes of them kernels 3 to 7 times slower (docs/log.md): it reads rows in the order of slots and cuts
the backward in three. To be imported where needed only: Triton comes with CUDA builds of torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096  # of one program


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Same contract as `torch_rows.weighted_swiglu`: gate_up [pairs, 2 * width], weights [pairs] fp32 -> [pairs, width]."""
    pairs, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(pairs, width)
    columns = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // columns)
    swiglu_kernel[(triton.cdiv(pairs, rows),)](gate_up, weights, out, pairs, width, ROWS=rows, COLUMNS=columns)
    return out


def weighted_swiglu_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `torch_rows.weighted_swiglu_backward`; every row is summed by one program, in one order."""
    pairs, width = grad.shape
    grad_gate_up, out, grad_weights = torch.empty_like(gate_up), torch.empty_like(grad), torch.empty_like(weights)
    columns = triton.next_power_of_2(width)
    rows = max(1, ELEMENTS // columns)
    swiglu_backward_kernel[(triton.cdiv(pairs, rows),)](gate_up, weights, grad, grad_gate_up, out, grad_weights, pairs, width, ROWS=rows,
                                                        COLUMNS=columns)
    return grad_gate_up, out, grad_weights


def sum_of_slots(rows: Tensor, place: Tensor) -> Tensor:
    """Same contract as `torch_rows.sum_of_slots`: rows [pairs, hidden], place [tokens, k] -> [tokens, hidden]."""
    (tokens, k), hidden = place.shape, rows.shape[1]
    out = rows.new_empty(tokens, hidden)
    columns = min(1024, triton.next_power_of_2(hidden))
    sum_of_slots_kernel[(tokens, triton.cdiv(hidden, columns))](rows, place, out, hidden, K=k, COLUMNS=columns)
    return out


@triton.jit
def tile_of(pairs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    return row, column, (row < pairs)[:, None] & (column < width)[None, :]


@triton.jit
def swiglu_kernel(gate_up, scale, out, pairs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = tile_of(pairs, width, ROWS, COLUMNS)
    at = gate_up + row[:, None] * 2 * width + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(scale + row, mask=row < pairs, other=0.0)[:, None]
    y = gate * tl.sigmoid(gate) * up * weight
    tl.store(out + row[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(gate_up, scale, grad, grad_gate_up, out, grad_scale, pairs, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, inside = tile_of(pairs, width, ROWS, COLUMNS)
    wide, narrow = row[:, None] * 2 * width + column[None, :], row[:, None] * width + column[None, :]
    gate = tl.load(gate_up + wide, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + wide + width, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + narrow, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(scale + row, mask=row < pairs, other=0.0)[:, None]
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    product, weighted = silu * up, g * weight
    kind = out.dtype.element_ty
    tl.store(grad_gate_up + wide, (weighted * up * (sigmoid + silu * (1 - sigmoid))).to(kind), mask=inside)
    tl.store(grad_gate_up + wide + width, (weighted * silu).to(kind), mask=inside)
    tl.store(out + narrow, (product * weight).to(kind), mask=inside)
    tl.store(grad_scale + row, tl.sum(g * product, axis=1), mask=row < pairs)


@triton.jit
def sum_of_slots_kernel(rows, place, out, hidden, K: tl.constexpr, COLUMNS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in tl.static_range(K):
        row = tl.load(place + token * K + slot)
        total += tl.load(rows + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), mask=column < hidden)
