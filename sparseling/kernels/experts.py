"""Routed SwiGLU experts, tokens sorted by expert once, one matrix product per expert and projection.

Dropless, no padding. Forward and backward are gathers and matrix products only (no atomic adds): the same input gives the
same bits at a fixed thread count. The routing weight is folded into the backward where it is narrow, so that the unweighted
expert outputs need not be kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Same contract as `reference.experts`: x [tokens, hidden] -> [tokens, hidden], fp32 combine in top-k order."""
    return GroupedExperts.apply(x, expert_ids, weights, gate_up_proj, down_proj)


def group_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Sort the (token, slot) pairs by expert.

    expert_ids [tokens, k]. Returns `order` [tokens * k] (flat pair index in expert order, stable) and the non-empty
    (expert, first, last) ranges of it.
    """
    flat = expert_ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return order, [(e, a, b) for e, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]


class GroupedExperts(torch.autograd.Function):
    """The autograd node behind `experts`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        num_experts, twice_width, hidden = gate_up_proj.shape
        tokens, k = expert_ids.shape
        order, ranges = group_by_expert(expert_ids, num_experts)
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
        grad_x = grad_x_sorted.index_select(0, position_of_pair).view(tokens, k, -1).sum(1)
        return grad_x, None, grad_weights, grad_gate_up_proj, grad_down_proj
