"""Routed SwiGLU experts, tokens sorted by expert once. Dropless, no padding; deterministic at a fixed thread count."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, reference
from .choose import path_for
from .library import as_weights, call, common, operand_dtype, pad, require, wants_gradient
from .route import sort_by_expert


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Same contract as `reference.experts`: x [tokens, hidden] -> [tokens, hidden], fp32 combine in top-k order."""
    path, expert_ids = path_for(x), expert_ids.long()
    if path == "cpu":
        rows = x.to(operand_dtype(x))
        num_experts, hidden, width = down_proj.shape
        require(gate_up_proj.shape == (num_experts, 2 * width, hidden) and x.shape[1] == hidden, x, gate_up_proj, down_proj)
        require(expert_ids.shape == weights.shape == (len(x), expert_ids.shape[1]), x, expert_ids, weights)
        keep = wants_gradient(rows, weights, gate_up_proj, down_proj)
        gate_up, down = as_weights(rows, gate_up_proj, down_proj)
        return CpuExperts.apply(rows, expert_ids, weights.float(), gate_up, None, down, keep).to(x.dtype)
    if path == "cuda" and cuda.can_group(x, gate_up_proj):
        return cuda.experts(x, expert_ids, weights.float(), gate_up_proj, down_proj)
    if path == "reference":
        return reference.experts(x, expert_ids, weights, gate_up_proj, down_proj)
    return GroupedExperts.apply(x, expert_ids, weights.float(), gate_up_proj.to(x.dtype), down_proj.to(x.dtype))


def swiglu(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Same contract as `reference.swiglu`: one dense SwiGLU, x [..., hidden] -> same. On the C++ path: the one expert of every token."""
    if path_for(x) == "cpu":
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(operand_dtype(x))
        hidden, width = down_proj.shape
        require(gate_proj.shape == up_proj.shape == (width, hidden) and x.shape[-1] == hidden, x, gate_proj, up_proj, down_proj)
        ids, ones = torch.zeros(len(rows), 1, dtype=torch.int64), torch.ones(len(rows), 1)
        keep = wants_gradient(rows, gate_proj, up_proj, down_proj)
        gate, up, down = as_weights(rows, gate_proj, up_proj, down_proj)
        return CpuExperts.apply(rows, ids, ones, gate, up, down, keep).to(x.dtype).view(x.shape)
    return reference.swiglu(x, gate_proj, up_proj, down_proj)


class CpuExperts(torch.autograd.Function):
    """The C++ kernel. `gate` holds gate and up rows [experts, 2 * width, hidden] when `up` is None; else it is one dense SwiGLU,
    gate and up both [width, hidden]. `keep` what the backward needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor | None, down: Tensor,
                keep: bool) -> Tensor:
        order, ends = sort_by_expert(expert_ids, len(gate) if up is None else 1)
        padded, projections = pad(x, 1), Projections.of(gate, up, down)
        shape = projections.shape(padded, weights)
        gate_up = padded.new_empty(len(order), 2 * shape[-1]) if keep else None
        out = torch.empty_like(padded)
        call("experts_forward", *common(padded, gate), *shape, padded, order, ends, weights.contiguous(), *projections.arguments(),
             projections.stride, gate_up, out)
        ctx.save_for_backward(x, order, ends, weights, gate, up, down, gate_up)
        return out[:, :x.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, order, ends, weights, gate, up, down, gate_up = ctx.saved_tensors
        padded, projections = pad(x, 1), Projections.of(gate, up, down)
        into = projections.like()
        grad_x, grad_weights = torch.empty_like(padded), torch.empty(weights.shape, dtype=weights.dtype)
        call("experts_backward", *common(padded, gate), *projections.shape(padded, weights), padded, order, ends, weights.contiguous(),
             *projections.arguments(), projections.stride, gate_up, pad(grads[0], 1), grad_x, *into.arguments(), grad_weights)
        return grad_x[:, :x.shape[1]], None, grad_weights, *into.unpadded(gate, up, down), None


@dataclass(frozen=True)
class Projections:
    """Weights, or their gradients, as the C functions take them, hidden and width padded to multiples of 32.

    Routed experts have gate and up in one array [experts, 2, width, hidden], and `up` is None; a dense SwiGLU has one for each,
    [1, width, hidden]. `down` [experts, hidden, width].
    """

    gate: Tensor
    up: Tensor | None
    down: Tensor

    @staticmethod
    def of(gate: Tensor, up: Tensor | None, down: Tensor) -> Projections:
        if up is None:
            return Projections(pad(gate.reshape(len(gate), 2, -1, gate.shape[-1]), 2, 3), None, pad(down, 1, 2))
        return Projections(pad(gate[None], 1, 2), pad(up[None], 1, 2), pad(down[None], 1, 2))

    def like(self) -> Projections:
        """Room for as much."""
        return Projections(torch.empty_like(self.gate), None if self.up is None else torch.empty_like(self.up), torch.empty_like(self.down))

    @property
    def stride(self) -> int:
        """Elements from the gate rows of one expert to those of the next, and so for up."""
        return self.gate[0].numel()

    def shape(self, x: Tensor, weights: Tensor) -> tuple[int, ...]:
        """(tokens, k, experts, hidden, width)."""
        return len(x), weights.shape[1], *self.down.shape

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up, down, each from its first row on."""
        up = self.gate.view(-1)[self.stride // 2:] if self.up is None else self.up
        return self.gate, up, self.down

    def unpadded(self, gate: Tensor, up: Tensor | None, down: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """In the shapes of the parameters."""
        hidden, width = gate.shape[-1], down.shape[-1]
        rows = self.down[:, :down.shape[-2], :width]
        if self.up is None:
            return self.gate[:, :, :width, :hidden].reshape(gate.shape), None, rows
        return self.gate[0, :width, :hidden], self.up[0, :width, :hidden], rows[0]


class GroupedExperts(torch.autograd.Function):
    """PyTorch operations only: gathers, and one matrix product per expert and projection.

    Forward and backward use no atomic adds. The routing weight is folded into the backward where it is narrow, so that the
    unweighted expert outputs need not be kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        num_experts, twice_width, hidden = gate_up_proj.shape
        tokens, k = expert_ids.shape
        flat = expert_ids.reshape(-1)
        order = torch.argsort(flat, stable=True)
        bounds = [0, *torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()]
        ranges = [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a]
        token_of_pair = torch.div(order, k, rounding_mode="floor")
        x_sorted = x.index_select(0, token_of_pair)                         # [pairs, hidden]
        gate_up = x.new_empty(len(order), twice_width)                      # [pairs, 2 * width]
        for e, a, b in ranges:
            torch.mm(x_sorted[a:b], gate_up_proj[e].t(), out=gate_up[a:b])
        gate, up = gate_up.chunk(2, dim=-1)
        activation = F.silu(gate) * up                                      # [pairs, width]
        y = torch.empty_like(x_sorted)                                      # [pairs, hidden]
        for e, a, b in ranges:
            torch.mm(activation[a:b], down_proj[e].t(), out=y[a:b])
        position_of_pair = torch.empty_like(order)
        position_of_pair[order] = torch.arange(len(order), device=order.device)
        by_token = y.index_select(0, position_of_pair).view(tokens, k, hidden)
        ctx.save_for_backward(x_sorted, gate_up, token_of_pair, position_of_pair, order, weights, gate_up_proj, down_proj)
        ctx.ranges = ranges
        return torch.bmm(weights.unsqueeze(1), by_token.float()).squeeze(1).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_sorted, gate_up, token_of_pair, position_of_pair, order, weights, gate_up_proj, down_proj = ctx.saved_tensors
        tokens, k = weights.shape
        grad_y = grads[0].contiguous().index_select(0, token_of_pair)       # [pairs, hidden], before the routing weight
        gate, up = gate_up.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        activation = silu * up
        grad_activation = torch.empty_like(activation)                      # [pairs, width], before the routing weight
        for e, a, b in ctx.ranges:
            torch.mm(grad_y[a:b], down_proj[e], out=grad_activation[a:b])
        grad_weights = (grad_activation.float() * activation.float()).sum(-1).index_select(0, position_of_pair).view(tokens, k)
        pair_weights = weights.reshape(-1).index_select(0, order).unsqueeze(1).to(activation.dtype)
        activation = activation * pair_weights
        grad_activation *= pair_weights
        grad_gate_up = torch.cat([grad_activation * up * (sigmoid + silu * (1 - sigmoid)), grad_activation * silu], dim=-1)
        grad_gate_up_proj, grad_down_proj = torch.zeros_like(gate_up_proj), torch.zeros_like(down_proj)
        grad_x_sorted = torch.empty_like(x_sorted)
        for e, a, b in ctx.ranges:
            torch.mm(grad_gate_up[a:b], gate_up_proj[e], out=grad_x_sorted[a:b])
            torch.mm(grad_gate_up[a:b].t(), x_sorted[a:b], out=grad_gate_up_proj[e])
            torch.mm(grad_y[a:b].t(), activation[a:b], out=grad_down_proj[e])
        grad_x = grad_x_sorted.index_select(0, position_of_pair).view(tokens, k, x_sorted.shape[1]).sum(1)
        return grad_x, None, grad_weights, grad_gate_up_proj, grad_down_proj
