"""The operations on the current CUDA device: grouped matrix products with Triton between them, variable-length flash attention, and
pointwise code fused by `torch.compile`.

Tested on a GPU by tests/kernels/test_gpu.py, and as far as CPU tensors allow by test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference, torch_rows

ALIGNMENT_BYTES = 16  # grouped_mm refuses rows that do not start at multiples of this
_documents = WeakTensorKeyDictionary()  # see documents_of


def can_group(x: Tensor, gate_up_proj: Tensor) -> bool:
    """Whether `grouped_mm` takes these: both inner sizes aligned, and on a GPU bf16."""
    if x.is_cuda and x.dtype != torch.bfloat16:
        return False
    unit = ALIGNMENT_BYTES // x.element_size()
    return x.shape[1] % unit == 0 and gate_up_proj.shape[1] // 2 % unit == 0 and len(x) > 0


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Same contract as `reference.experts`, for shapes that `can_group`. The routing weight is applied where rows are narrow. Nobody looks
    whether expert ids are inside: the router's are, and looking would make the host wait."""
    result: Tensor = SortedExperts.apply(x, expert_ids, weights, gate_up_proj.to(x.dtype), down_proj.to(x.dtype))
    return result


class SortedExperts(torch.autograd.Function):
    """x [tokens, hidden], expert_ids and weights [tokens, k], gate_up_proj [experts, 2 * width, hidden], down_proj [experts, hidden,
    width] -> [tokens, hidden]. One grouped product a projection; no atomic adds: same input, same bits. Gathered rows are not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
        k, flat = expert_ids.shape[1], expert_ids.reshape(-1)
        sorted_ids, order = torch.sort(flat, stable=True)                        # [pairs] pair at each sorted place
        # searched, for bincount makes the host wait for the device
        ends = torch.searchsorted(sorted_ids, torch.arange(len(gate_up_proj), device=x.device), right=True).int()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)             # [pairs] sorted place of each pair
        token, scale = torch.div(order, k, rounding_mode="floor"), weights.reshape(-1).index_select(0, order)
        gate_up = F.grouped_mm(x.index_select(0, token), gate_up_proj.transpose(1, 2), offs=ends)
        y = F.grouped_mm(rows_of(x).weighted_swiglu(gate_up, scale), down_proj.transpose(1, 2), offs=ends)
        ctx.save_for_backward(x, gate_up, token, place.view(-1, k), scale, ends, gate_up_proj, down_proj)
        out: Tensor = rows_of(x).sum_of_slots(y, place.view(-1, k))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, token, place, scale, ends, gate_up_proj, down_proj = ctx.saved_tensors
        grad_y = grads[0].index_select(0, token)                                 # [pairs, hidden]
        grad_activation = F.grouped_mm(grad_y, down_proj, offs=ends)             # [pairs, width]
        grad_gate_up, activation, grad_scale = rows_of(x).weighted_swiglu_backward(gate_up, scale, grad_activation)
        grad_down = F.grouped_mm(grad_y.t(), activation, offs=ends)
        grad_gate_up_proj = F.grouped_mm(grad_gate_up.t(), x.index_select(0, token), offs=ends)
        grad_x = rows_of(x).sum_of_slots(F.grouped_mm(grad_gate_up, gate_up_proj, offs=ends), place)
        return grad_x, None, grad_scale[place], grad_gate_up_proj, grad_down


def rows_of(x: Tensor) -> ModuleType:
    """The module with what lies between the products: Triton for tensors on a GPU, PyTorch for others, which tests give."""
    if x.is_cuda:
        from . import triton_rows

        return triton_rows
    return torch_rows


def attention(query: Tensor, key: Tensor, value: Tensor, first_key: Tensor) -> Tensor:
    """Same contract as `reference.attention` for packed documents without a cache, by one variable-length kernel over all rows."""
    batch, heads, seq, _ = query.shape
    q, k, v = (t.transpose(1, 2).reshape(batch * seq, t.shape[1], -1) for t in (query, key, value))
    y = varlen_attention(q, k, v, *documents_of(first_key))                      # [tokens, heads, head_dim]
    return y.view(batch, seq, heads, -1).transpose(1, 2)


def documents_of(first_key: Tensor) -> tuple[Tensor, int]:
    """Where documents start in all rows end to end, and the end of the last, int32 [documents + 1]; and the length of the longest.

    From first_key [batch, seq], which must not be changed afterwards: counting makes the host wait for the device, so the result is kept as
    long as that tensor lives, once a forward instead of once a layer.
    """
    if first_key not in _documents:
        batch, seq = first_key.shape
        begins = first_key == torch.arange(seq, device=first_key.device)
        starts = begins.flatten().nonzero().flatten()
        starts = torch.cat([starts, starts.new_tensor([batch * seq])]).int()
        _documents[first_key] = starts, int(starts.diff().max())
    kept: tuple[Tensor, int] = _documents[first_key]
    return kept


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Causal attention within [starts[i], starts[i + 1]) of tensors [tokens, heads or kv_heads, head_dim]."""
    from torch.nn.attention.varlen import varlen_attn

    # window (-1, 0): all keys to the left, none to the right
    y = varlen_attn(query, key, value, starts, starts, longest, longest, window_size=(-1, 0), enable_gqa=True)
    assert isinstance(y, Tensor)
    return y


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled into fused kernels."""
    return torch.compile(function, dynamic=True)


def fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """`compiled` for tensors on a GPU; as it stands for others, which tests give."""
    return compiled(function) if x.is_cuda else function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as `reference.rms_norm`, in one kernel a direction."""
    result: Tensor = fused(reference.rms_norm, x)(x.reshape(-1, x.shape[-1]), weight, eps)  # one shape of input: fewer compilations
    return result.view(x.shape)


def query_key_value(rows: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor,
                    eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.query_key_value`, fused."""
    query, key, value = fused(reference.query_key_value, rows)(rows, heads, kv_heads, norms, cos, sin, eps)
    return query, key, value
