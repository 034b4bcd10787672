"""What the engine is made of: matrices and vectors by name, each from tensors with public names.

    embedding, head, norm, layers.0.query_key_value, ..., layers.0.down, ..., mtp.0.eh_proj, mtp.0.query_key_value, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.names import EMBEDDING, HEAD
from ..config import ModelConfig
from .packed import Kind, Packed, empty_packed, pack_into

# In the order in which csrc/engine/exports.h numbers them.
MATRICES = ("query_key_value", "dense", "router", "gate_up", "down", "shared_gate_up", "shared_down")
VECTORS = ("input_norm", "post_norm", "query_norm", "key_norm", "expert_bias", "query_key_value_bias", "dense_bias")
OUTER_MATRICES = ("head", "eh_proj")  # of no layer; the MTP layer's door is one of them
OUTER_VECTORS = ("norm", "cosine", "sine", "enorm", "hnorm", "final_norm")
Part = Packed | Tensor


@dataclass(frozen=True)
class PartPlan:
    """One part before it is made. `tensors`: the public tensors it is made of, in order. A matrix [rows, columns] of some `kind` has them
    one below the other, or `paired`: 16 rows of a gate, the same 16 of its up, and so on. Without a kind it is a vector, fp32, or the
    embedding, as stored."""

    name: str
    tensors: tuple[str, ...]
    rows: int
    columns: int
    kind: Kind | None = None
    paired: bool = False


def plan_parts(config: ModelConfig, kind: Kind) -> list[PartPlan]:
    """All parts of a model: outer ones, decoder layers, MTP layers. The router stays fp32 whatever the kind."""
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    size = (config.vocab_size, config.hidden_size)
    plans = [PartPlan("embedding", (EMBEDDING,), *size), PartPlan("head", (head,), *size, kind),
             PartPlan("norm", ("model.norm.weight",), 1, config.hidden_size)]
    for layer in range(config.num_hidden_layers):
        plans += plan_layer(config, kind, f"layers.{layer}", f"model.layers.{layer}", config.is_dense(layer))
    for number in range(config.num_nextn_predict_layers):
        public = f"model.layers.{config.num_hidden_layers + number}"
        plans.append(PartPlan(f"mtp.{number}.eh_proj", (f"{public}.eh_proj.weight",), config.hidden_size, 2 * config.hidden_size, kind))
        plans += [PartPlan(f"mtp.{number}.{name}", (f"{public}.{tensor}.weight",), 1, config.hidden_size)
                  for name, tensor in (("enorm", "enorm"), ("hnorm", "hnorm"), ("final_norm", "final_layernorm"))]
        plans += plan_layer(config, kind, f"mtp.{number}", public, dense=False)
    return plans


def plan_layer(config: ModelConfig, kind: Kind, name: str, public: str, dense: bool) -> list[PartPlan]:
    """The parts of one layer."""
    hidden, heads_width = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv_rows = heads_width + 2 * config.num_key_value_heads * config.head_dim

    def vector(part: str, tensor: str, size: int) -> PartPlan:
        return PartPlan(f"{name}.{part}", (f"{public}.{tensor}",), 1, size)

    def swiglu(prefix: str, stems: list[str], width: int) -> list[PartPlan]:
        pairs = tuple(f"{public}.{stem}.{which}_proj.weight" for stem in stems for which in ("gate", "up"))
        down = tuple(f"{public}.{stem}.down_proj.weight" for stem in stems)
        return [PartPlan(f"{name}.{prefix}gate_up", pairs, 2 * width * len(stems), hidden, kind, paired=True),
                PartPlan(f"{name}.{prefix}down", down, hidden * len(stems), width, kind)]

    plans = [vector("input_norm", "input_layernorm.weight", hidden),
             PartPlan(f"{name}.query_key_value", (f"{public}.attention.query_key_value.weight",), qkv_rows, hidden, kind)]
    if config.use_qkv_bias:
        plans.append(vector("query_key_value_bias", "attention.query_key_value.bias", qkv_rows))
    if config.use_qk_norm:
        plans += [vector(f"{which}_norm", f"attention.{which}_layernorm.weight", config.head_dim) for which in ("query", "key")]
    plans.append(PartPlan(f"{name}.dense", (f"{public}.attention.dense.weight",), hidden, heads_width, kind))
    if config.use_bias:
        plans.append(vector("dense_bias", "attention.dense.bias", hidden))
    plans.append(vector("post_norm", "post_attention_layernorm.weight", hidden))
    if dense:
        return plans + swiglu("", ["mlp"], config.intermediate_size)
    plans += [PartPlan(f"{name}.router", (f"{public}.mlp.gate.weight",), config.num_experts, hidden, "fp32"),
              vector("expert_bias", "mlp.gate.expert_bias", config.num_experts)]
    plans += swiglu("", [f"mlp.experts.{expert}" for expert in range(config.num_experts)], config.moe_intermediate_size)
    if config.shared_expert_intermediate_size:
        plans += swiglu("shared_", ["mlp.shared_experts"], config.shared_expert_intermediate_size)
    return plans


def make_part(plan: PartPlan, tensors: Iterator[Tensor]) -> Part:
    """Takes the next `len(plan.tensors)` tensors, one at a time in memory, and packs them."""
    if plan.kind is None:
        tensor = next(tensors).detach()
        as_stored = plan.name == "embedding" and tensor.dtype == torch.bfloat16
        return (tensor if as_stored else tensor.float()).contiguous()
    packed = empty_packed(plan.kind, plan.rows, plan.columns)
    blocks = packed.padded[0] // 16 // len(plan.tensors)
    for number in range(len(plan.tensors)):
        if plan.paired:
            pack_into(packed, next(tensors), number // 2 * 2 * blocks + number % 2, step=2)
        else:
            pack_into(packed, next(tensors), number * blocks)
    return packed
