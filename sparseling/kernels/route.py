"""From router logits to experts and their weights; and sorting (token, slot) pairs by expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .choose import path_for
from .library import call, require


def route(logits: Tensor, expert_bias: Tensor, groups: int, groups_kept: int, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.route`. Equal scores: in C++ the smaller id comes first, in PyTorch the order is open."""
    experts = logits.shape[1]
    if path_for(logits) != "cpu" or logits.dtype != torch.float32:
        return reference.route(logits, expert_bias, groups, groups_kept, k, scale)
    fits = experts % groups == 0 and 1 <= groups_kept <= groups and 1 <= k <= groups_kept * (experts // groups)
    require(fits and expert_bias.shape == (experts,), logits, expert_bias)
    ids, weights, log_norm = CpuRoute.apply(logits.contiguous(), expert_bias.detach().float().contiguous(), groups, groups_kept, k, scale)
    return ids, weights, log_norm


class CpuRoute(torch.autograd.Function):
    """The C++ kernel; the backward needs the logits alone, whatever the number of experts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, expert_bias: Tensor, groups: int, groups_kept: int, k: int,
                scale: float) -> tuple[Tensor, Tensor, Tensor]:
        tokens, experts = logits.shape
        ids, weights = torch.empty(tokens, k, dtype=torch.int64), logits.new_empty(tokens, k)
        log_norm = logits.new_empty(tokens)
        call("route_forward", torch.get_num_threads(), tokens, experts, groups, groups_kept, k, float(scale), logits, expert_bias, ids,
             weights, log_norm)
        ctx.save_for_backward(logits, ids, log_norm)
        ctx.scale = float(scale)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return ids, weights, log_norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ids, log_norm = ctx.saved_tensors
        _, grad_weights, grad_log_norm = (None if grad is None else grad.contiguous() for grad in grads)
        grad_logits = torch.empty_like(logits)
        call("route_backward", torch.get_num_threads(), *logits.shape, ids.shape[1], ctx.scale, logits, ids, log_norm, grad_weights,
             grad_log_norm, grad_logits)
        return grad_logits, None, None, None, None, None


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The (token, slot) pairs in expert order: `order` int32 [tokens * k], flat pair indices (stable), and `ends` int64 [experts] into it.

    Raises `IndexError` for an id outside 0 .. num_experts - 1.
    """
    flat = expert_ids.reshape(-1).long().contiguous()
    if len(flat) >= 2**31:
        raise ValueError(f"{len(flat):,} (token, expert) pairs at once are too many; give fewer tokens at a time")
    order, ends = torch.empty(len(flat), dtype=torch.int32), torch.empty(num_experts, dtype=torch.int64)
    out_of_range = torch.empty(1, dtype=torch.int64)
    call("sort_by_expert", len(flat), num_experts, flat, order, ends, out_of_range)
    if (place := int(out_of_range)) >= 0:
        raise IndexError(f"expert id {int(flat[place])} is outside the {num_experts} experts")
    return order, ends
