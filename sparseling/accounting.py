"""What a model costs, from its config alone: parameters, FLOPs per token, bytes of KV cache. Nothing is built.

Exact: the totals equal the published ones to the last digit (tests/test_accounting.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts. `active` counts both embedding matrices, `active_non_embedding` neither, as the published figures do.

    MTP layers (`mtp`) are in `total` and never in the active counts: they are not used to produce the next token.
    `expert_bias` is a buffer and not counted.
    """

    total: int
    active: int
    active_non_embedding: int
    embedding: int
    attention_per_layer: int
    dense_mlp: int
    expert: int
    router: int
    mtp: int


def count_parameters(config: ModelConfig) -> Parameters:
    """Counts by the arithmetic of the public layout (tensor shapes of the checkpoint)."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    qkv_rows = (heads + 2 * kv_heads) * config.head_dim
    attention = hidden * qkv_rows + heads * config.head_dim * hidden
    attention += 2 * config.head_dim if config.use_qk_norm else 0
    attention += (qkv_rows if config.use_qkv_bias else 0) + (hidden if config.use_bias else 0)
    dense_mlp = 3 * hidden * config.intermediate_size
    expert = 3 * hidden * config.moe_intermediate_size
    shared = 3 * hidden * config.shared_expert_intermediate_size
    router = config.num_experts * hidden
    norms = 2 * hidden
    dense_layers = min(config.first_k_dense_replace, config.num_hidden_layers)
    moe_layers = config.num_hidden_layers - dense_layers

    def layers(experts: int) -> int:
        moe_layer = attention + norms + router + shared + experts * expert
        return dense_layers * (attention + norms + dense_mlp) + moe_layers * moe_layer

    embedding = config.vocab_size * hidden
    embeddings = embedding if config.tie_word_embeddings else 2 * embedding
    mtp_layer = attention + norms + router + shared + config.num_experts * expert + 2 * hidden * hidden + 3 * hidden
    mtp = config.num_nextn_predict_layers * mtp_layer
    active_non_embedding = hidden + layers(config.num_experts_per_tok)
    return Parameters(
        total=embeddings + hidden + layers(config.num_experts) + mtp,
        active=embeddings + active_non_embedding,
        active_non_embedding=active_non_embedding,
        embedding=embedding, attention_per_layer=attention, dense_mlp=dense_mlp, expert=expert, router=router, mtp=mtp,
    )


def forward_flops_per_token(config: ModelConfig, seq_length: int, *, head: bool = False, mtp: bool = False) -> int:
    """Matmul FLOPs of one token's forward pass in a sequence of `seq_length` tokens (full square attention, no causal halving).

    EL §2.1 and App. C: attention projections, scores and values, SwiGLU of the active experts; the router adds `2 d E`.
    `head` adds the output projection, `mtp` the MTP layers (with their use of the head when `head` is set).
    """
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    attention = 2 * hidden * width + 4 * hidden * kv_width + 2 * width * hidden + 4 * seq_length * width
    dense = 6 * hidden * config.intermediate_size
    active_width = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    moe = 6 * hidden * active_width + 2 * hidden * config.num_experts
    dense_layers = min(config.first_k_dense_replace, config.num_hidden_layers)
    flops = config.num_hidden_layers * attention + dense_layers * dense + (config.num_hidden_layers - dense_layers) * moe
    passes_of_head = 1
    if mtp:
        flops += config.num_nextn_predict_layers * (attention + moe + 4 * hidden * hidden)
        passes_of_head += config.num_nextn_predict_layers
    if head:
        flops += passes_of_head * 2 * hidden * config.vocab_size
    return flops


def training_flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """FLOPs a training token really costs: forward and backward (3 x forward), head and MTP included."""
    return 3 * forward_flops_per_token(config, seq_length, head=True, mtp=True)


def law_flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """M of the Ling scaling laws: 3 x forward, without embeddings, head, router and MTP (EL §2.1, App. C)."""
    router = 2 * config.hidden_size * config.num_experts
    moe_layers = max(0, config.num_hidden_layers - config.first_k_dense_replace)
    return 3 * (forward_flops_per_token(config, seq_length) - moe_layers * router)


def kv_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes of KV cache that one token takes over all decoder layers (bf16 by default)."""
    return 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * bytes_per_element
