"""How fast this machine reads memory, and how many bytes of weights a step of the engine has to read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import ModelConfig
from ..kernels.library import call
from ..run.packed import BITS, GROUP_COLUMNS, Kind, large_pages

READ_BYTES = 1 << 30


class Reader:
    """Memory of `size` bytes to read again and again; far larger than any cache by default."""

    def __init__(self, threads: int, size: int = READ_BYTES) -> None:
        self.threads, self.memory = threads, large_pages(size).fill_(1)
        self.digest = torch.zeros(1)

    def bytes_per_second(self, passes: int = 1) -> float:
        """Of the fastest pass."""
        return self.memory.numel() / min(self.pass_seconds() for _ in range(passes))

    def pass_seconds(self) -> float:
        start = time.perf_counter()
        call("read", self.threads, self.memory, self.memory.numel(), self.digest)
        return time.perf_counter() - start


@dataclass(frozen=True)
class WeightBytes:
    """`always`: read in every step, whatever its tokens; `expert`: one routed expert of one layer."""

    always: int
    expert: int

    def of_step(self, experts_hit: Sequence[int]) -> int:
        """With so many different experts in each layer that has some."""
        return self.always + sum(experts_hit) * self.expert


def weight_bytes(config: ModelConfig, kind: Kind) -> WeightBytes:
    """Bytes that the engine reads of a model packed in `kind`; the rows of the embedding are left out."""
    hidden, head_dim = config.hidden_size, config.head_dim
    query_rows = config.num_attention_heads * head_dim
    per_layer = matrix_bytes(query_rows + 2 * config.num_key_value_heads * head_dim, hidden, kind) + matrix_bytes(hidden, query_rows, kind)
    always = matrix_bytes(config.vocab_size, hidden, kind) + config.num_hidden_layers * per_layer
    for layer in range(config.num_hidden_layers):
        if config.is_dense(layer):
            always += swiglu_bytes(config.intermediate_size, hidden, kind)
        else:
            always += matrix_bytes(config.num_experts, hidden, "fp32") + swiglu_bytes(config.shared_expert_intermediate_size, hidden, kind)
    return WeightBytes(always, swiglu_bytes(config.moe_intermediate_size, hidden, kind))


def swiglu_bytes(width: int, hidden: int, kind: Kind) -> int:
    return matrix_bytes(2 * width, hidden, kind) + matrix_bytes(hidden, width, kind)


def matrix_bytes(rows: int, columns: int, kind: Kind) -> int:
    """Of numbers and scales, the filling up left out."""
    scales = 2 * rows * columns // GROUP_COLUMNS if kind in ("int8", "int4") else 0
    return rows * columns * BITS[kind] // 8 + scales
