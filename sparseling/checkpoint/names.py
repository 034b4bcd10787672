"""The public tensor names: which tensors a model of a given config has on disk, and where they lie in a model in memory.

The two differ in one thing: in memory the routed experts of a layer are stacked (model/mlp.py), on disk each matrix is a tensor.
Layers are numbered as on disk: decoder layers from 0, MTP layers from `num_hidden_layers` on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError

EMBEDDING, HEAD = "model.word_embeddings.weight", "lm_head.weight"
MTP_MARK = "eh_proj.weight"  # only MTP layers have it
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
Shape = tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, tuple[Shape, str]]:
    """Every public tensor of a model as name: (shape, kind), in the order of the forward pass. Nothing is built.

    The kind is 'float32' for the expert biases, which are float32 in every checkpoint, and 'weight' for all others, which
    have the dtype of the checkpoint. A tied head (`tie_word_embeddings`) is not stored.
    """
    hidden = config.hidden_size
    tensors: dict[str, tuple[Shape, str]] = {EMBEDDING: ((config.vocab_size, hidden), "weight")}
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        if layer >= config.num_hidden_layers:
            parts = mtp_tensors(hidden) | layer_tensors(config, dense=False)
        else:
            parts = layer_tensors(config, config.is_dense(layer))
        tensors |= {f"model.layers.{layer}.{name}": (shape, kind_of(name)) for name, shape in parts.items()}
    tensors["model.norm.weight"] = ((hidden,), "weight")
    if not config.tie_word_embeddings:
        tensors[HEAD] = ((config.vocab_size, hidden), "weight")
    return tensors


def kind_of(name: str) -> str:
    """'float32' for expert biases, else 'weight'."""
    return "float32" if name.endswith(".expert_bias") else "weight"


def layer_tensors(config: ModelConfig, dense: bool) -> dict[str, Shape]:
    """Names within a decoder layer, and shapes."""
    hidden, heads_width = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv_rows = heads_width + 2 * config.num_key_value_heads * config.head_dim
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "attention.query_key_value.weight": (qkv_rows, hidden)}
    if config.use_qkv_bias:
        tensors["attention.query_key_value.bias"] = (qkv_rows,)
    if config.use_qk_norm:
        tensors |= {f"attention.{which}_layernorm.weight": (config.head_dim,) for which in ("query", "key")}
    tensors["attention.dense.weight"] = (hidden, heads_width)
    if config.use_bias:
        tensors["attention.dense.bias"] = (hidden,)
    tensors["post_attention_layernorm.weight"] = (hidden,)
    if dense:
        return tensors | swiglu_tensors("mlp", hidden, config.intermediate_size)
    tensors |= {"mlp.gate.weight": (config.num_experts, hidden), "mlp.gate.expert_bias": (config.num_experts,)}
    for expert in range(config.num_experts):
        tensors |= swiglu_tensors(f"mlp.experts.{expert}", hidden, config.moe_intermediate_size)
    if config.shared_expert_intermediate_size:
        tensors |= swiglu_tensors("mlp.shared_experts", hidden, config.shared_expert_intermediate_size)
    return tensors


def swiglu_tensors(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    """The three matrices of one SwiGLU."""
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}


def mtp_tensors(hidden: int) -> dict[str, Shape]:
    """What an MTP layer has beyond a decoder layer."""
    tensors: dict[str, Shape] = {MTP_MARK: (hidden, 2 * hidden)}
    return tensors | {f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "final_layernorm")}


def public_views(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(public name, tensor) for a state dict of the model in memory; routed experts are taken apart as views, without a copy.

    Works both ways: read a view to save, write into it to load. Tensors that have the public form already pass through.
    """
    for name, tensor in state.items():
        stem, _, stacked = name.rpartition(".")
        if stacked == "gate_up_proj":
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                yield f"{stem}.{expert}.gate_proj.weight", gate
                yield f"{stem}.{expert}.up_proj.weight", up
        elif stacked == "down_proj":
            for expert, matrix in enumerate(tensor):
                yield f"{stem}.{expert}.down_proj.weight", matrix
        else:
            yield name, tensor


def layer_of(name: str) -> int | None:
    """The layer number in a public name, None outside the layers."""
    match = LAYER.fullmatch(name)
    return int(match[1]) if match else None


def mtp_layers(names: Iterable[str]) -> list[int]:
    """Numbers of the MTP layers among stored tensors: the layers that have `eh_proj`."""
    return sorted({layer for name in names if name.endswith("." + MTP_MARK) and (layer := layer_of(name)) is not None})


def config_as_stored(config: ModelConfig, names: Iterable[str], source: str) -> ModelConfig:
    """`config` with the decoder and MTP layers that a checkpoint really holds.

    Ling-V2 numbers MTP layers after `num_hidden_layers`; Ring-V2 counts them into it, as its last layers. Either way an MTP layer
    keeps its number; only the number of decoder layers is another. Chat checkpoints have no MTP weights, whatever config says.
    """
    ahead = mtp_layers(names)
    layers, promised = config.num_hidden_layers, config.num_nextn_predict_layers
    if not ahead:
        return config.replace(num_nextn_predict_layers=0)
    if ahead[-1] >= layers:
        decoder = layers
    else:
        decoder = layers - max(promised, len(ahead))
    if decoder < 1 or ahead[0] < decoder:
        raise UserError(f"{source}: layer {ahead[0]} is an MTP layer (it has eh_proj), but only the last of the {layers} layers in "
                        "config.json can be; use config.json and weights of the same model")
    return config.replace(num_hidden_layers=decoder, num_nextn_predict_layers=max(promised, ahead[-1] + 1 - decoder))
