"""Routed SwiGLU experts, tokens sorted by expert once. Dropless, no padding; deterministic at a fixed thread count."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, reference
from .choose import path_for
from .library import as_weight, call, common, operand_dtype, pad, require, wants_gradient
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
        stacked = (as_weight(gate_up_proj, rows), None, as_weight(down_proj, rows))
        return CpuExperts.apply(rows, expert_ids, weights.float(), *stacked, keep).to(x.dtype)
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
        projections = (as_weight(w, rows) for w in (gate_proj, up_proj, down_proj))
        return CpuExperts.apply(rows, ids, ones, *projections, keep).to(x.dtype).view(x.shape)
    return reference.swiglu(x, gate_proj, up_proj, down_proj)


class CpuExperts(torch.autograd.Function):
    """The C++ kernel. `gate` holds gate and up rows [experts, 2 * width, hidden] when `up` is None; else it is one dense SwiGLU,
    gate and up both [width, hidden]. `keep` what the backward needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor | None, down: Tensor,
                keep: bool) -> Tensor:
        num_experts = len(gate) if up is None else 1
        order, ends = sort_by_expert(expert_ids, num_experts)
        ctx.save_for_backward(x, order, ends, weights, gate, up, down)
        shape, tensors = prepared(x, weights, gate, up, down, order, ends)
        padded = tensors[0]
        ctx.gate_up = padded.new_empty(len(order), 2 * shape[-1]) if keep else None
        out = torch.empty_like(padded)
        call("experts_forward", *common(padded, tensors[4]), *shape, *tensors, ctx.gate_up, out)
        return out[:, :x.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, order, ends, weights, gate, up, down = ctx.saved_tensors
        shape, tensors = prepared(x, weights, gate, up, down, order, ends)
        padded, _, _, scales, gates, _, downs, _ = tensors
        hidden, width = shape[-2:]
        grad_x, grad_weights = torch.empty_like(padded), torch.empty_like(scales)
        grad_gates, grad_downs = torch.empty_like(gates), torch.empty_like(downs)
        call("experts_backward", *common(padded, gates), *shape, *tensors, ctx.gate_up, pad(grads[0], 1), grad_x, grad_gates,
             grad_gates.view(-1)[width * hidden:], grad_downs, grad_weights)
        grad_gate, grad_up, grad_down = unprepared(grad_gates, grad_downs, gate, up, down)
        return grad_x[:, :x.shape[1]], None, grad_weights, grad_gate, grad_up, grad_down, None


def prepared(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor | None, down: Tensor, order: Tensor,
             ends: Tensor) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """Sizes and arrays as the C functions take them, hidden and width padded to multiples of 32.

    Gate and up become one array [experts, 2, width, hidden].
    """
    if up is None:
        pairs = gate.view(len(gate), 2, -1, gate.shape[-1])
        down_rows = down
    else:
        pairs, down_rows = torch.stack([gate, up])[None], down[None]
    pairs, down_rows, x = pad(pairs, 2, 3), pad(down_rows, 1, 2), pad(x, 1)
    num_experts, _, width, hidden = pairs.shape
    shape = (len(x), weights.shape[1], num_experts, hidden, width)
    return shape, (x, order, ends, weights.contiguous(), pairs, pairs.view(-1)[width * hidden:], down_rows, 2 * width * hidden)


def unprepared(grad_pairs: Tensor, grad_down: Tensor, gate: Tensor, up: Tensor | None,
               down: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients in the shapes of the parameters."""
    hidden = gate.shape[-1]
    width = down.shape[-1]
    pairs, rows = grad_pairs[:, :, :width, :hidden], grad_down[:, :hidden, :width]
    if up is None:
        return pairs.reshape(gate.shape), None, rows
    return pairs[0, 0], pairs[0, 1], rows[0]


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
