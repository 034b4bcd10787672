"""The operations on CUDA devices: grouped matrix products, variable-length flash attention, and fused pointwise code by `torch.compile`.

Not yet run on a GPU. The expert path is tested on CPU tensors, the packing for attention with an emulated kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

ALIGNMENT_BYTES = 16  # grouped_mm refuses rows that do not start at multiples of this


def can_group(x: Tensor, gate_up_proj: Tensor) -> bool:
    """Whether `grouped_mm` takes these shapes: both inner sizes aligned."""
    unit = ALIGNMENT_BYTES // x.element_size()
    return x.shape[1] % unit == 0 and gate_up_proj.shape[1] // 2 % unit == 0 and len(x) > 0


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Same contract as `reference.experts`, for shapes that `can_group`. The routing weight is applied where rows are narrow."""
    tokens, k = expert_ids.shape
    flat = expert_ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=len(gate_up_proj)).cumsum(0).int()
    rows = x.index_select(0, torch.div(order, k, rounding_mode="floor"))         # [pairs, hidden]
    gate_up = F.grouped_mm(rows, gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends)
    gate, up = gate_up.chunk(2, dim=-1)
    scale = weights.reshape(-1, 1).index_select(0, order)
    activation = (F.silu(gate) * up * scale).to(x.dtype)                         # [pairs, width]
    y = F.grouped_mm(activation, down_proj.to(x.dtype).transpose(1, 2), offs=ends)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return y.index_select(0, position).view(tokens, k, -1).float().sum(1).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, first_key: Tensor) -> Tensor:
    """Same contract as `reference.attention` for packed documents without a cache, by one variable-length kernel over all rows."""
    batch, heads, seq, _ = query.shape
    starts = document_starts(first_key)
    longest = int((starts[1:] - starts[:-1]).max())
    q, k, v = (t.transpose(1, 2).reshape(batch * seq, t.shape[1], -1) for t in (query, key, value))
    y = varlen_attention(q, k, v, starts, longest)                               # [tokens, heads, head_dim]
    return y.view(batch, seq, heads, -1).transpose(1, 2)


def document_starts(first_key: Tensor) -> Tensor:
    """Where documents start in all rows end to end, and the end of the last: int32 [documents + 1], from first_key [batch, seq]."""
    batch, seq = first_key.shape
    begins = first_key == torch.arange(seq, device=first_key.device)
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([batch * seq])]).int()


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention within [starts[i], starts[i + 1]) of tensors [tokens, heads or kv_heads, head_dim]."""
    from torch.nn.attention.varlen import varlen_attn

    # window (-1, 0): all keys to the left, none to the right
    y = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(y, Tensor)
    return y


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference function compiled into fused kernels."""
    return torch.compile(function, dynamic=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as `reference.rms_norm`, in one kernel a direction."""
    result: Tensor = compiled(reference.rms_norm)(x, weight, eps)
    return result


def query_key_value(rows: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor,
                    eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.query_key_value`, fused."""
    query, key, value = compiled(reference.query_key_value)(rows, heads, kv_heads, norms, cos, sin, eps)
    return query, key, value
