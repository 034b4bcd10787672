"""Grouped-query attention with QK-norm before half RoPE (L2 §2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.attention import attention
from .cache import KVCache
from .norm import RMSNorm
from .rotary import Rotary, rotate


class Attention(nn.Module):
    """One fused projection: all query heads, then all key heads, then all value heads."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.layer = layer
        self.attend = attention
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=config.use_qkv_bias)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=config.use_bias)
        self.use_qk_norm = config.use_qk_norm
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """x [batch, seq, hidden] -> same. mask [batch, 1, seq, keys] bool, True = may look; None = plain causal."""
        batch, seq, _ = x.shape
        heads = self.query_key_value(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)  # [batch, heads + 2 kv_heads, seq, head_dim]
        query, key, value = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        if self.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        y = self.attend(query, key, value, mask)                                 # [batch, heads, seq, head_dim]
        return self.dense(y.transpose(1, 2).reshape(batch, seq, -1))


def attention_mask(
    batch: int, seq: int, cached: int, device: torch.device, document_ids: Tensor | None, padding: Tensor | None
) -> Tensor | None:
    """Who may look at whom: causal, within one document, not at padding. [batch, 1, seq, cached + seq] bool, or None for plain causal.

    document_ids [batch, seq] (without cache only); padding [batch, cached + seq], 0 = padding. A position may always look at
    itself: a row without any key would give NaN, and NaN at a pad slot would reach real tokens through the values.
    """
    if document_ids is None and padding is None and (cached == 0 or seq == 1):
        return None
    queries = torch.arange(cached, cached + seq, device=device)
    keys = torch.arange(cached + seq, device=device)
    mask = (queries[:, None] >= keys[None, :]).expand(batch, 1, -1, -1)
    if document_ids is not None:
        assert cached == 0, "packed documents are for training, a cache for generation"
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if padding is not None:
        mask = mask & padding.bool()[:, None, None, :]
    return mask | (queries[:, None] == keys[None, :])
