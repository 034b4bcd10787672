"""The models that the benchmarks train, as a few numbers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..accounting import training_flops_per_token
from ..config import ModelConfig
from ..errors import UsageError

HEAD_DIM = 32
QUERIES_PER_KEY_HEAD = 4
SHARED_EXPERTS = 1


@dataclass(frozen=True)
class Shape:
    """A model and a step: `width` of one expert, lengths in tokens, `sequences` of `seq_length` tokens a step.

    The first layer is dense, as wide as the active experts of another; heads have 32 elements, four query heads share a key head. No
    multi-token prediction, and no expert groups: the peer has neither.
    """

    layers: int = 8
    hidden: int = 256
    experts: int = 64
    width: int = 128
    top_k: int = 8
    vocab: int = 16384
    seq_length: int = 512
    sequences: int = 16

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise UsageError(f"--layers: {self.layers} leaves no layer with experts, for the first is dense; give 2 or more")
        if self.top_k > self.experts:
            raise UsageError(f"--top-k: {self.top_k} exceeds the {self.experts} experts; give fewer")
        if self.seq_length < 2:
            raise UsageError("--seq-length: a sequence of one token has nothing to predict; give 2 or more")

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.sequences * self.seq_length

    @property
    def heads(self) -> tuple[int, int]:
        """(query heads, key and value heads)."""
        heads = max(1, self.hidden // HEAD_DIM)
        most = max(1, heads // QUERIES_PER_KEY_HEAD)
        return heads, next(kv for kv in range(most, 0, -1) if heads % kv == 0)

    def replace(self, **changes: int) -> Shape:
        return dataclasses.replace(self, **changes)


def useful_flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """FLOPs of a training token that have to be computed: as `training_flops_per_token`, but attention looks back only, at
    (seq_length + 1) / 2 keys on average, where the usual convention counts the full square."""
    return training_flops_per_token(config, (seq_length + 1) // 2)


def sparse_config(shape: Shape) -> ModelConfig:
    """The model of this shape, with routed experts and a shared one in every layer but the first."""
    heads, kv_heads = shape.heads
    return ModelConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=HEAD_DIM, intermediate_size=shape.width * (shape.top_k + SHARED_EXPERTS),
        first_k_dense_replace=1, moe_intermediate_size=shape.width, num_experts=shape.experts, num_shared_experts=SHARED_EXPERTS,
        num_experts_per_tok=shape.top_k, n_group=1, topk_group=1, rope_theta=10000.0, max_position_embeddings=shape.seq_length,
        initializer_range=0.02, pad_token_id=0, eos_token_id=0,
    )


def dense_config(shape: Shape) -> ModelConfig:
    """The dense model with as many active parameters a token: every layer like the first."""
    return sparse_config(shape).replace(first_k_dense_replace=shape.layers)


def peer_config(shape: Shape) -> ModelConfig:
    """What the peer computes, for counting its FLOPs: the sparse model without the shared expert."""
    return sparse_config(shape).replace(num_shared_experts=0)
