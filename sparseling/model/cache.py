"""The KV cache: keys after norm and RoPE, and values, for every decoder layer, in memory taken once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig


class KVCache:
    """Preallocated keys and values, [layers][batch, kv_heads, capacity, head_dim]; `length` tokens are filled in every row."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [batch, kv_heads, new, head_dim] after `length`; return all of the layer so far."""
        end = self.length + keys.shape[2]
        if end > self.capacity:
            raise ValueError(f"KV cache: {end} tokens exceed its capacity of {self.capacity}; make it larger")
        self.keys[layer, :, :, self.length:end] = keys
        self.values[layer, :, :, self.length:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop the sequences that are finished: keep batch rows `rows` (int64), in that order."""
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)
