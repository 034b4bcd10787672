"""From the fused projection to queries, keys and values: QK-norm, then rotation of part of each head, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, reference
from .choose import path_for
from .library import call, common, operand_dtype, pad, require


def query_key_value(rows: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor,
                    eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as `reference.query_key_value`: rows [batch, seq, (heads + 2 kv_heads) * head_dim] -> q, k, v by head."""
    path = path_for(rows)
    if path == "cuda":
        return cuda.query_key_value(rows, heads, kv_heads, norms, cos, sin, eps)
    if path != "cpu":
        return reference.query_key_value(rows, heads, kv_heads, norms, cos, sin, eps)
    batch, seq, size = rows.shape
    head_dim = size // (heads + 2 * kv_heads)
    require(head_dim * (heads + 2 * kv_heads) == size and all(w.shape == (head_dim,) for w in norms or ()), rows, *(norms or ()))
    require(cos.shape == sin.shape == (batch, seq, cos.shape[-1]) and cos.shape[-1] % 2 == 0 and cos.shape[-1] <= head_dim, rows, cos, sin)
    by_head = rows.view(batch * seq, heads + 2 * kv_heads, -1).to(operand_dtype(rows))
    half = cos.shape[-1] // 2
    cosine, sine = (t[..., :half].reshape(batch * seq, half).float().contiguous() for t in (cos, sin))
    parts = CpuQueryKeyValue.apply(by_head, *(norms or (None, None)), cosine, sine, heads, kv_heads, float(eps))
    query, key, value = (part.to(rows.dtype).view(batch, seq, part.shape[1], -1).transpose(1, 2) for part in parts)
    return query, key, value


class CpuQueryKeyValue(torch.autograd.Function):
    """rows [tokens, heads + 2 kv_heads, head_dim]; cosine, sine [tokens, rotary_dim / 2] fp32 -> q, k, v [tokens, heads or kv_heads,
    head_dim]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cosine: Tensor, sine: Tensor,
                heads: int, kv_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows, query_weight, key_weight, cosine, sine)
        padded = pad(rows, 2)
        tokens, _, size = padded.shape
        sizes = torch.tensor([tokens, heads, kv_heads, size, rows.shape[2], cosine.shape[1]])
        ctx.sizes, ctx.eps = sizes, eps
        q, k, v = (padded.new_empty(tokens, h, size) for h in (heads, kv_heads, kv_heads))
        weights = padded_weights(query_weight, key_weight)
        call("query_key_value_forward", *common(padded), sizes, eps, padded, *weights, cosine, sine, q, k, v)
        true_size = rows.shape[2]
        return q[..., :true_size], k[..., :true_size], v[..., :true_size]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, query_weight, key_weight, cosine, sine = ctx.saved_tensors
        padded, (grad_q, grad_k, grad_v) = pad(rows, 2), (pad(g, 2) for g in grads)
        weights = padded_weights(query_weight, key_weight)
        grad_rows = torch.empty_like(padded)
        grad_weights = [None if w is None else torch.empty_like(w) for w in weights]
        call("query_key_value_backward", *common(padded), ctx.sizes, ctx.eps, padded, *weights, cosine, sine, grad_q, grad_k, grad_v,
             grad_rows, *grad_weights)
        size = rows.shape[2]
        of_weights = [None if g is None else g[:size].to(w.dtype) for g, w in zip(grad_weights, (query_weight, key_weight), strict=True)]
        return grad_rows[..., :size], *of_weights, None, None, None, None, None


def padded_weights(*weights: Tensor | None) -> list[Tensor | None]:
    return [None if w is None else pad(w.float(), 0) for w in weights]
