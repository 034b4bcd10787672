"""Causal attention with grouped queries inside packed documents."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, reference
from .choose import path_for
from .library import call, common, operand_dtype, pad, require


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, first_key: Tensor | None = None) -> Tensor:
    """Same contract as `reference.attention`, on the path for these tensors.

    Equal to it in fp32 to rounding. In bf16 scores stay fp32 where the reference rounds them, so the two differ by a few bf16 steps.
    """
    queries, keys = query.shape[2], key.shape[2]
    path = path_for(query)
    if path == "reference":
        return reference.attention(query, key, value, mask, first_key)
    if path == "cpu" and mask is None and queries > 1:
        batch, heads, _, size = query.shape
        kv_heads = key.shape[1]
        require(key.shape == value.shape == (batch, kv_heads, keys, size) and heads % kv_heads == 0 and keys >= queries, query, key, value)
        require(first_key is None or first_key.shape == (batch, queries), query, first_key)
        q, k, v = (t.to(operand_dtype(query)) for t in (query, key, value))
        return CpuAttention.apply(q, k, v, first_key, math.sqrt(query.shape[-1])).to(query.dtype)
    if path == "cuda" and query.dtype == torch.bfloat16 and mask is None and first_key is not None and queries == keys:
        return cuda.attention(query, key, value, first_key)
    if mask is None and first_key is None and queries in (1, keys):
        return F.scaled_dot_product_attention(query, key, value, is_causal=queries > 1, enable_gqa=True)
    if mask is None:
        mask = causal_mask(queries, keys, first_key, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def causal_mask(queries: int, keys: int, first_key: Tensor | None, device: torch.device) -> Tensor:
    """[1 or batch, 1, queries, keys] bool: query i (the queries are the last positions) may look at keys first_key[i] .. its own."""
    position = torch.arange(keys, device=device)
    mask = position[None, :] <= torch.arange(keys - queries, keys, device=device)[:, None]
    if first_key is None:
        return mask[None, None]
    return mask & (position >= first_key[:, None, :, None])


class CpuAttention(torch.autograd.Function):
    """query [batch, heads, queries, head_dim], key and value [batch, kv_heads, keys, head_dim], any strides -> like query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, first_key: Tensor | None, divisor: float) -> Tensor:
        first_key = None if first_key is None else first_key.clamp(min=0).int().contiguous()
        tensors = [with_dense_heads(t) for t in (query, key, value)]
        batch, heads, queries, size = tensors[0].shape
        out = query.new_empty(batch, queries, heads, size)
        log_norm = torch.empty(batch, heads, queries, dtype=torch.float32)
        call("attention_forward", *common(query), *layout(*tensors), 1 / divisor, *tensors, first_key, out, log_norm)
        ctx.save_for_backward(query, key, value, first_key, out, log_norm)
        ctx.divisor = divisor
        return out[..., :query.shape[3]].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, first_key, out, log_norm = ctx.saved_tensors
        tensors = [with_dense_heads(t) for t in (query, key, value)]
        grad_out = pad(grads[0].transpose(1, 2), 3)                                # [batch, queries, heads, head_dim]
        grad_q, grad_k, grad_v = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in tensors)
        call("attention_backward", *common(query), *layout(*tensors), 1 / ctx.divisor, *tensors, first_key, out, log_norm, grad_out,
             grad_q, grad_k, grad_v)
        size = query.shape[3]
        return *(g[..., :size].transpose(1, 2) for g in (grad_q, grad_k, grad_v)), None, None


def with_dense_heads(x: Tensor) -> Tensor:
    """x with a dense last dimension, padded to a multiple of 32."""
    return pad(x, 3) if x.shape[3] % 32 or x.stride(3) != 1 else x


def layout(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The sizes and strides arrays of the C functions."""
    batch, heads, queries, size = query.shape
    strides = [s for t in (query, key, value) for s in (t.stride(0), t.stride(2), t.stride(1))]
    return torch.tensor([batch, heads, key.shape[1], queries, key.shape[2], size]), torch.tensor(strides)
