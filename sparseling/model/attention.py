"""Grouped-query attention with QK-norm before half RoPE (L2 §2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.attention import attention, causal_mask
from ..kernels.query_key_value import query_key_value
from .cache import KVCache
from .linear import Linear
from .norm import RMSNorm
from .rotary import Rotary


@dataclass(frozen=True)
class Mask:
    """Beside causality: the first key of each query's document, [batch, seq], or all that may be seen, [batch, 1, seq, keys] bool."""

    first_key: Tensor | None = None
    allowed: Tensor | None = None


class Attention(nn.Module):
    """One fused projection: all query heads, then all key heads, then all value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer = layer
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        self.dense = Linear(self.heads * self.head_dim, config.hidden_size, bias=config.use_bias)
        self.use_qk_norm, self.eps = config.use_qk_norm, config.rms_norm_eps
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None) -> Tensor:
        """x [batch, seq, hidden] -> same."""
        batch, seq, _ = x.shape
        norms = (self.query_layernorm.weight, self.key_layernorm.weight) if self.use_qk_norm else None
        query, key, value = query_key_value(self.query_key_value(x), self.heads, self.kv_heads, norms, rotary.cos, rotary.sin, self.eps)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        y = attention(query, key, value, mask.allowed, mask.first_key)           # [batch, heads, seq, head_dim]
        return self.dense(y.transpose(1, 2).reshape(batch, seq, -1))


def build_mask(seq: int, cached: int, device: torch.device, document_ids: Tensor | None, padding: Tensor | None) -> Mask:
    """Who may look at whom: causal, within one document, not at padding.

    document_ids [batch, seq], constant within each document (without cache only); padding [batch, cached + seq], 0 = padding. A
    position may always look at itself: a row without any key would give NaN, and NaN at a pad slot would reach real tokens through
    the values.
    """
    first_key = None
    if document_ids is not None:
        assert cached == 0, "packed documents are for training, a cache for generation"
        first_key = (torch.arange(seq, device=device) - positions_in_documents(document_ids)).int()
    if padding is None:
        return Mask(first_key=first_key)
    mask = causal_mask(seq, cached + seq, first_key, device) & padding.bool()[:, None, None, :]
    itself = torch.arange(cached, cached + seq, device=device)[:, None] == torch.arange(cached + seq, device=device)
    return Mask(allowed=mask | itself)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Position of each token within its document: [batch, seq] ids that are constant within a document -> [batch, seq]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
