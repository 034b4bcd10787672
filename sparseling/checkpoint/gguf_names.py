"""The GGUF tensor names of `bailingmoe2` (llama.cpp), and which public tensors each of them holds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..config import ModelConfig
from .names import EMBEDDING, HEAD, LAYER, expected_tensors

TOP = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "attention.query_key_value.weight": "attn_qkv.weight",
    "attention.query_layernorm.weight": "attn_q_norm.weight",
    "attention.key_layernorm.weight": "attn_k_norm.weight",
    "attention.dense.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.expert_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    "eh_proj.weight": "nextn.eh_proj.weight",
    "enorm.weight": "nextn.enorm.weight",
    "hnorm.weight": "nextn.hnorm.weight",
    "final_layernorm.weight": "layer_output_norm.weight",
}
EXPERT = re.compile(r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")
ROUTER = "ffn_gate_inp.weight"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: its `shape` (rows of the last size), and the public tensors it holds, stacked when there are several."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]


def gguf_name(public: str) -> str:
    """The name of the GGUF tensor that holds a public tensor. Raises `KeyError` for one that llama.cpp has no place for."""
    match = LAYER.fullmatch(public)
    if match is None:
        return TOP[public]
    expert = EXPERT.fullmatch(match[2])
    return f"blk.{match[1]}." + (f"ffn_{expert[1]}_exps.weight" if expert else IN_LAYER[match[2]])


def gguf_tensors(config: ModelConfig) -> list[GgufTensor]:
    """All tensors of the file in their order. A tied head is written once more: llama.cpp asks for it.

    MTP layers keep their numbers after the decoder's. Raises `KeyError` as `gguf_name` does.
    """
    sources: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    expected = expected_tensors(config)
    for public, (shape, _) in expected.items():
        name = gguf_name(public)
        sources.setdefault(name, []).append(public)
        shapes[name] = (config.num_experts, *shape) if name.endswith("_exps.weight") else shape
    if config.tie_word_embeddings:
        sources[TOP[HEAD]], shapes[TOP[HEAD]] = [EMBEDDING], expected[EMBEDDING][0]
    return [GgufTensor(name, shapes[name], tuple(public)) for name, public in sources.items()]
