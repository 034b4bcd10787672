"""The key-value part of a `bailingmoe2` GGUF file: the model's config and its tokenizer; and what llama.cpp cannot load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..data.tokenizer import SPLIT_PATTERN, Tokenizer
from ..errors import UserError
from ..files import read_json
from ..progress import say

ARCHITECTURE = "bailingmoe2"
MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token types of GGUF


def refuse_unloadable(config: ModelConfig, source: str) -> None:
    """Raise `UserError`, naming the key, for a model that llama.cpp's `bailingmoe2` cannot load or would compute otherwise."""
    heads_width = config.num_attention_heads * config.head_dim
    scaling = config.rope_scaling or {}
    own_yarn = any(scaling.get(key) is not None for key in ("attention_factor", "mscale", "mscale_all_dim"))
    rules = [
        (heads_width == config.hidden_size, f"num_attention_heads x head_dim = {heads_width} is not hidden_size {config.hidden_size}"),
        (config.use_qk_norm, "use_qk_norm is false"),
        (not config.use_qkv_bias, "use_qkv_bias is true"),
        (not config.use_bias, "use_bias is true"),
        (config.num_shared_experts > 0, "num_shared_experts is 0"),
        (config.num_experts <= MOST_EXPERTS, f"num_experts {config.num_experts} exceeds {MOST_EXPERTS}"),
        (not own_yarn and scaling.get("truncate", True), "rope_scaling sets attention_factor, mscale or truncate"),
    ]
    for fine, what in rules:
        if not fine:
            raise UserError(f"{source}: {what}, which llama.cpp has no place for; run this model with sparseling itself")


def add_config(writer: Any, config: ModelConfig, name: str) -> None:
    """All keys of the model. Groups that choose nothing (all kept) are left out, as llama.cpp asks."""
    import gguf

    groups, kept = config.groups
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers + config.num_nextn_predict_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(config.moe_intermediate_size)  # of one: llama.cpp multiplies by their count
    writer.add_expert_shared_count(config.num_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.num_experts_per_tok > 1)  # a single expert's score stays as it is
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if kept < groups:
        writer.add_expert_group_count(groups)
        writer.add_expert_group_used_count(kept)
    if config.num_nextn_predict_layers:
        writer.add_nextn_predict_layers(config.num_nextn_predict_layers)
    if config.rope_scaling is not None:
        add_yarn(writer, config, config.rope_scaling)


def add_yarn(writer: Any, config: ModelConfig, scaling: dict[str, Any]) -> None:
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(scaling["factor"]))
    writer.add_rope_scaling_orig_ctx_len(int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings))
    writer.add_rope_scaling_yarn_beta_fast(float(scaling.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(scaling.get("beta_slow") or 1))


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Byte-level BPE as llama.cpp's `gpt2`: a token for every row of the embedding, merges, ids with a meaning, the chat template.

    llama.cpp splits text by Ling's rule as we do, but does not bring it to the Unicode form NFC first. Raises `UserError` for another
    kind of tokenizer, or one with more tokens than rows.
    """
    definition, tokenizer = read_json(folder / "tokenizer.json"), Tokenizer.load(folder)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; put the model's own tokenizer "
                        "there")
    if (definition["model"].get("type") or "BPE") != "BPE" or definition["model"].get("byte_fallback"):
        raise UserError(f"{folder / 'tokenizer.json'}: is no byte-level BPE; give the model's own Ling 2.0 tokenizer")
    tokens, types = token_table(definition, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_rule(definition, folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in definition["model"]["merges"]])
    if "<|startoftext|>" in tokenizer.added_tokens:
        writer.add_bos_token_id(tokenizer.added_tokens["<|startoftext|>"])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.exists() else tokenizer.chat_template
    if text:
        writer.add_chat_template(text)


def token_table(definition: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """(text, type) of every id; rows without a token become unused `[PADn]`."""
    tokens, types = [f"[PAD{n}]" for n in range(vocab_size)], [UNUSED] * vocab_size
    for token, number in definition["model"]["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in definition["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def split_rule(definition: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of the pre-tokeniser; it knows Ling's. Another one is said, for text will be cut otherwise there."""
    steps = (definition.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    if (steps[0].get("pattern") or {}).get("Regex") == SPLIT_PATTERN and steps[-1].get("type") == "ByteLevel":
        return ARCHITECTURE
    say(f"{folder / 'tokenizer.json'}: splits text by another rule than Ling 2.0: llama.cpp will use its default rule, and may make other "
        "tokens of a text; token ids given directly are exact")
    return "default"
