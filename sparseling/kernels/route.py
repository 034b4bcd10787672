"""Choosing experts, and sorting (token, slot) pairs by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .choose import path_for
from .library import call, require


def choose_experts(biased_scores: Tensor, groups: int, groups_kept: int, k: int) -> Tensor:
    """Same contract as `reference.choose_experts`. Equal scores: in C++ the smaller id comes first, in PyTorch the order is open."""
    tokens, experts = biased_scores.shape
    if path_for(biased_scores) != "cpu" or biased_scores.dtype != torch.float32:
        return reference.choose_experts(biased_scores, groups, groups_kept, k)
    require(k <= groups_kept * (experts // groups) and experts % groups == 0, biased_scores)
    ids = torch.empty(tokens, k, dtype=torch.int64)
    call("choose_experts", torch.get_num_threads(), tokens, experts, groups, groups_kept, k, biased_scores.contiguous(), ids)
    return ids


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The (token, slot) pairs in expert order: `order` int32 [tokens * k], flat pair indices (stable), and `ends` int64 [experts] into it.

    Raises `IndexError` for an id outside 0 .. num_experts - 1.
    """
    flat = expert_ids.reshape(-1).contiguous()
    order, ends = torch.empty(len(flat), dtype=torch.int32), torch.empty(num_experts, dtype=torch.int64)
    out_of_range = torch.empty(1, dtype=torch.int64)
    call("sort_by_expert", len(flat), num_experts, flat, order, ends, out_of_range)
    if (place := int(out_of_range)) >= 0:
        raise IndexError(f"expert id {int(flat[place])} is outside the {num_experts} experts")
    return order, ends
