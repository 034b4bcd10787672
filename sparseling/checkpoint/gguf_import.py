"""Import of GGUF: a `bailingmoe2` file, quantised or not, back to a public folder, one matrix in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..data.tokenizer import END_OF_TEXT, NAMED_TOKENS, untrained_pipeline
from ..errors import UserError
from ..files import write_aside, write_json
from ..progress import bar, say
from .gguf import require_gguf
from .gguf_metadata import ARCHITECTURE, CONTROL, NORMAL, USER_DEFINED
from .gguf_names import GgufTensor, gguf_tensors
from .hf import save_model, some

SIGMOID = 2


def import_gguf(path: str | Path, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a GGUF file as a public folder in `dtype`, with the tokenizer that it carries.

    Raises `UserError`: the file is damaged, of another architecture, lacks tensors or keys, or its tokenizer is not Ling's kind; and as
    `save_model` does.
    """
    keys, tensors = opened(path)
    config = config_of_keys(keys, str(path))
    wanted = gguf_tensors(config)
    check_tensors(wanted, tensors, str(path))
    with tempfile.TemporaryDirectory() as aside:
        try:
            tokenizer = restore_tokenizer(keys, Path(aside), str(path))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{path}: its tokenizer is damaged ({type(error).__name__}: {error}); download the file again") from None
        save_model(read_back(wanted, tensors), config, folder, tokenizer_folder=tokenizer, dtype=dtype)


def opened(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values by key, tensors of the reader by name); the weights stay on the disk."""
    gguf = require_gguf()
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
        keys = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the reader checks little: a damaged file may raise anything
        raise UserError(f"{path}: is no GGUF file, or damaged or cut short ({error}); download or write it again") from None
    architecture = keys.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"{path}: holds a model of architecture '{architecture}', not {ARCHITECTURE}; only Ling 2.0 models can be read")
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def config_of_keys(keys: dict[str, Any], source: str) -> ModelConfig:
    """The config behind the keys of a file. Raises `UserError` for a missing key, or a model that is not Ling 2.0."""

    def value(key: str, default: Any = None) -> Any:
        found = keys.get(f"{ARCHITECTURE}.{key}", default)
        if found is None:
            raise UserError(f"{source}: lacks the key {ARCHITECTURE}.{key}; convert the model again")
        return found

    if value("expert_gating_func") != SIGMOID:
        raise UserError(f"{source}: its experts are not chosen by sigmoid scores, as Ling 2.0 does; only Ling 2.0 models can be read")
    ahead = value("nextn_predict_layers", 0)
    head_dim = value("attention.key_length", value("embedding_length") // value("attention.head_count"))
    tokens = keys.get("tokenizer.ggml.tokens") or ()
    eos, pad = (int(keys.get(f"tokenizer.ggml.{name}_token_id", 0)) for name in ("eos", "padding"))
    return ModelConfig(
        vocab_size=value("vocab_size", len(tokens) or None), hidden_size=value("embedding_length"),
        num_hidden_layers=value("block_count") - ahead, num_nextn_predict_layers=ahead, num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"), head_dim=head_dim, intermediate_size=value("feed_forward_length"),
        first_k_dense_replace=value("leading_dense_block_count", 0), moe_intermediate_size=value("expert_feed_forward_length"),
        num_experts=value("expert_count"), num_experts_per_tok=value("expert_used_count"), num_shared_experts=value("expert_shared_count"),
        n_group=value("expert_group_count", 1), topk_group=value("expert_group_used_count", 1),
        routed_scaling_factor=shortest(value("expert_weights_scale", 1.0)),
        partial_rotary_factor=value("rope.dimension_count", head_dim) / head_dim, rope_theta=shortest(value("rope.freq_base", 10000.0)),
        rope_scaling=yarn_of_keys(keys), rms_norm_eps=shortest(value("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=value("context_length"), eos_token_id=eos, pad_token_id=pad,
    )


def shortest(value: float) -> float:
    """The number that was meant: keys are float32, where 1e-6 is 9.99999997e-07."""
    return float(str(np.float32(value)))


def yarn_of_keys(keys: dict[str, Any]) -> dict[str, Any] | None:
    scaling = {key.rpartition(".")[2]: value for key, value in keys.items() if key.startswith(f"{ARCHITECTURE}.rope.scaling.")}
    if scaling.get("type", "none") != "yarn":
        return None
    return {
        "type": "yarn", "factor": scaling["factor"], "original_max_position_embeddings": scaling["original_context_length"],
        "beta_fast": scaling.get("yarn_beta_fast", 32.0), "beta_slow": scaling.get("yarn_beta_slow", 1.0),
    }


def check_tensors(wanted: list[GgufTensor], found: dict[str, Any], source: str) -> None:
    """One `UserError` for all tensors that are missing, extra or misshapen."""
    names = {tensor.name: tensor.shape for tensor in wanted}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in found.items()}
    problems = [
        some([name for name in names if name not in found], "missing"), some([name for name in found if name not in names], "not known"),
        some([f"{name} {list(shapes[name])} instead of {list(shape)}" for name, shape in names.items()
              if name in found and shapes[name] != shape], "of another shape"),
    ]
    if any(problems):
        raise UserError(f"{source}: the tensors do not fit the keys of the file, {'; '.join(filter(None, problems))}; download it again")


def read_back(wanted: list[GgufTensor], found: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(public name, float tensor), quantised blocks multiplied out."""
    gguf = require_gguf()
    with bar("reading GGUF", len(wanted)) as line:
        for tensor in wanted:
            stored = found[tensor.name]
            parts = stored.data if len(tensor.sources) > 1 else [stored.data]
            for public, part in zip(tensor.sources, parts, strict=True):
                try:
                    values = np.array(gguf.quants.dequantize(part, stored.tensor_type), dtype=np.float32)
                except NotImplementedError:
                    raise UserError(f"{tensor.name}: is stored as {stored.tensor_type.name}, which cannot be read; take another file"
                                    ) from None
                yield public, torch.from_numpy(values)
            line.advance()


def restore_tokenizer(keys: dict[str, Any], folder: Path, source: str) -> Path | None:
    """Write the tokenizer of the file's tokens and merges to `folder` in Ling's pipeline; None when the file has none."""
    import tokenizers

    if keys.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
        say(f"{source}: has no tokenizer; put the model's own into the folder")
        return None
    if keys["tokenizer.ggml.model"] != "gpt2" or keys.get("tokenizer.ggml.pre") not in ("bailingmoe", ARCHITECTURE):
        raise UserError(f"{source}: its tokenizer is not Ling's ({keys['tokenizer.ggml.model']}, {keys.get('tokenizer.ggml.pre')}); "
                        "only Ling 2.0 models can be read")
    entries = list(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    pipeline = untrained_pipeline()
    pipeline.model = tokenizers.models.BPE(
        vocab={token: number for number, (token, kind) in enumerate(entries) if kind == NORMAL},
        merges=[tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"]],
    )
    for number, (token, kind) in enumerate(entries):
        if kind in (CONTROL, USER_DEFINED):
            pipeline.add_tokens([tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)])
            if pipeline.token_to_id(token) != number:
                raise UserError(f"{source}: token {number} ('{token}') stands where added tokens cannot be; download the file again")
    with write_aside(folder / "tokenizer.json") as stream:
        stream.write(pipeline.to_str(pretty=True))
    named = named_tokens(keys, {token for token, _ in entries})
    write_json(folder / "special_tokens_map.json", named)
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_eos_token": False, **named, "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": keys.get("tokenizer.chat_template"),
    })
    return folder


def named_tokens(keys: dict[str, Any], tokens: set[str]) -> dict[str, str]:
    """Tokens with a meaning: Ling's, where they are there, and those that the file names itself."""
    own = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}
    named = {name: token for name, token in NAMED_TOKENS.items() if token in tokens}
    for name, key in own.items():
        if f"tokenizer.ggml.{key}_token_id" in keys:
            named[name] = keys["tokenizer.ggml.tokens"][keys[f"tokenizer.ggml.{key}_token_id"]]
    return {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT} | named
