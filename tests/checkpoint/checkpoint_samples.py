"""Small models and folders for the tests of sparseling.checkpoint, made without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparseling.config import ModelConfig
from sparseling.model.transformer import LingForCausalLM, initialize

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = ModelConfig(
    vocab_size=80, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
    moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, rope_theta=10000.0, initializer_range=0.3,
    max_position_embeddings=64, num_nextn_predict_layers=1, pad_token_id=0, eos_token_id=1,
)
CHAT = SMALL.replace(num_nextn_predict_layers=0)


def made_model(config: ModelConfig = SMALL, seed: int = 0) -> LingForCausalLM:
    """A model in which no tensor has its default value."""
    model = initialize(LingForCausalLM(config), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def public_tensors(model: LingForCausalLM, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The public tensors of a model by the layout's definition: experts taken out of their stacks by index."""
    width = model.config.moe_intermediate_size
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for expert in range(model.config.num_experts):
                tensors[f"{stem}{expert}.gate_proj.weight"] = tensor[expert, :width]
                tensors[f"{stem}{expert}.up_proj.weight"] = tensor[expert, width:]
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            for expert in range(model.config.num_experts):
                tensors[f"{stem}{expert}.down_proj.weight"] = tensor[expert]
        else:
            tensors[name] = tensor
    dtypes = {name: torch.float32 if name.endswith("expert_bias") else dtype for name in tensors}
    return {name: tensor.to(dtypes[name]).contiguous().clone() for name, tensor in tensors.items()}


def write_public(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], **extra: object) -> Path:
    """A public folder of one file, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"torch_dtype": "float32"} | extra))
    return folder


def write_sharded(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], shards: int) -> Path:
    """A public folder of several files, tensors dealt out in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Files with the names of a tokenizer's files; what is in them does not matter here."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"file": name}))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_weights(first: LingForCausalLM, second: LingForCausalLM) -> bool:
    """Same names, dtypes and bits."""
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours)
