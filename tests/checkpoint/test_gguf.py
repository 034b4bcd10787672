"""GGUF files read back by the package gguf: every tensor, every key, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparseling.checkpoint.gguf as export
from sparseling.checkpoint.gguf import SCHEMES, export_folder, export_model
from sparseling.checkpoint.gguf_metadata import refuse_unloadable
from sparseling.checkpoint.hf import load_model, save_model
from sparseling.cli import main
from sparseling.config import ModelConfig
from sparseling.data.tokenizer import ADDED_TOKENS, Tokenizer, train_tokenizer
from sparseling.errors import UserError
from sparseling.model.transformer import LingForCausalLM, initialize

from .checkpoint_samples import CHAT, SMALL, made_model, public_tensors, write_sharded
from .test_fp8 import QUANTIZATION, fp8_tensors

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra [gguf])")
ENGINE = CHAT.replace(hidden_size=64, num_attention_heads=2, head_dim=32, moe_intermediate_size=32, intermediate_size=64)
BLOCK_ERROR = {"Q8_0": 0.6 / 127, "Q4_0": 1.05 / 8}  # largest error of an element as a share of its block's largest, with f16 scales


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with MTP and a tokenizer; the model has more rows than the tokenizer tokens."""
    made = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(["detailed thinking on, Größe 数 ünï\nHow many?"] * 20, 300, made / "tokenizer")
    config = SMALL.replace(vocab_size=320, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    save_model(made_model(config), config, made / "model", tokenizer_folder=made / "tokenizer", dtype=torch.float32)
    return made / "model"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values by key, tensors by name) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, {tensor.name: tensor for tensor in reader.tensors}


def values_of(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def expected_values(model: LingForCausalLM) -> dict[str, torch.Tensor]:
    """Every tensor of the file from the model in memory, by llama.cpp's names written out."""
    tensors = {"token_embd.weight": model.model.word_embeddings.weight, "output_norm.weight": model.model.norm.weight,
               "output.weight": model.lm_head.weight}
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.attention, layer.mlp
        parts = {
            "attn_norm.weight": layer.input_layernorm.weight, "attn_qkv.weight": attention.query_key_value.weight,
            "attn_q_norm.weight": attention.query_layernorm.weight, "attn_k_norm.weight": attention.key_layernorm.weight,
            "attn_output.weight": attention.dense.weight, "ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
        if number == 0:
            parts |= {f"ffn_{which}.weight": getattr(mlp, f"{which}_proj").weight for which in ("gate", "up", "down")}
        else:
            width = mlp.experts.gate_up_proj.shape[1] // 2
            parts |= {
                "ffn_gate_inp.weight": mlp.gate.weight, "exp_probs_b.bias": mlp.gate.expert_bias,
                "ffn_gate_exps.weight": mlp.experts.gate_up_proj[:, :width], "ffn_up_exps.weight": mlp.experts.gate_up_proj[:, width:],
                "ffn_down_exps.weight": mlp.experts.down_proj,
            }
            parts |= {f"ffn_{which}_shexp.weight": getattr(mlp.shared_experts, f"{which}_proj").weight for which in ("gate", "up", "down")}
        if hasattr(layer, "eh_proj"):
            parts |= {"nextn.eh_proj.weight": layer.eh_proj.weight, "nextn.enorm.weight": layer.enorm.weight,
                      "nextn.hnorm.weight": layer.hnorm.weight, "layer_output_norm.weight": layer.final_layernorm.weight}
        tensors |= {f"blk.{number}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.detach().float() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", list(SCHEMES))
@pytest.mark.parametrize("config", [SMALL, ENGINE], ids=["narrow", "engine"])
def test_every_tensor_comes_back_in_its_type(tmp_path: Path, kind: str, config: ModelConfig) -> None:
    model = made_model(config)
    export_model(model, tmp_path / "model.gguf", kind)
    _, tensors = read(tmp_path / "model.gguf")
    expected = expected_values(model)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        found, stored = values_of(tensors[name]), tensors[name].tensor_type.name
        assert found.shape == values.shape, name
        if values.dim() == 1 or name.endswith("gate_inp.weight"):
            assert stored == "F32" and torch.equal(found, values), name
        elif stored in ("F32", "F16", "BF16"):
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]
            assert stored == kind.upper() or (kind[0] == "q" and stored == "F16" and values.shape[-1] % 32), name
            assert torch.equal(found, values.to(dtype).float()), name
        else:
            ends = name in ("token_embd.weight", "output.weight")
            assert stored == ("Q8_0" if kind == "q8_0" or ends else "Q4_0"), name
            blocks = (found - values).reshape(-1, 32).abs().amax(1) / values.reshape(-1, 32).abs().amax(1)
            assert blocks.max() < BLOCK_ERROR[stored], name


@pytest.mark.parametrize(("shards", "layers_in_config"), [(1, 3), (5, 3), (3, 4)])  # 4: Ring-V2 counts the MTP layer in
def test_folders_in_any_form_give_the_model_they_hold(folder: Path, tmp_path: Path, shards: int, layers_in_config: int) -> None:
    """Shards, FP8 with scales, both ways to number the MTP layer."""
    config = SMALL.replace(vocab_size=320)
    stored, exact = fp8_tensors(public_tensors(made_model(config)))
    source = write_sharded(tmp_path / "fp8", config, stored, shards)
    public = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(public | {"quantization_config": QUANTIZATION, "num_hidden_layers": layers_in_config}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((folder / name).read_bytes())
    export_folder(source, tmp_path / "model.gguf", "f32")
    model = load_model(source, torch.float32)
    keys, tensors = read(tmp_path / "model.gguf")
    assert (keys["bailingmoe2.block_count"], keys["bailingmoe2.nextn_predict_layers"]) == (4, 1)
    for name, values in expected_values(model).items():
        assert torch.equal(values_of(tensors[name]), values), name
    assert torch.equal(values_of(tensors["blk.2.ffn_up_exps.weight"])[5], exact["model.layers.2.mlp.experts.5.up_proj.weight"])


def test_keys_say_what_the_config_says(folder: Path, tmp_path: Path) -> None:
    export_folder(folder, tmp_path / "named.gguf", "bf16")
    keys, tensors = read(tmp_path / "named.gguf")
    own = {key.removeprefix("bailingmoe2."): value for key, value in keys.items() if key.startswith("bailingmoe2.")}
    assert own == {
        "block_count": 4, "nextn_predict_layers": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "rope.freq_base": 10000.0, "rope.dimension_count": 4, "vocab_size": 320,
        "leading_dense_block_count": 1, "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 16,
        "expert_shared_feed_forward_length": 16, "expert_shared_count": 1, "expert_weights_scale": 2.5, "expert_weights_norm": True,
        "expert_gating_func": 2, "expert_group_count": 2, "expert_group_used_count": 1,
    }
    assert keys["general.architecture"] == "bailingmoe2" and keys["general.file_type"] == 32 and keys["general.name"] == "named"
    assert "blk.3.nextn.eh_proj.weight" in tensors


def test_tokens_have_their_ids_types_and_merges(folder: Path, tmp_path: Path) -> None:
    export_folder(folder, tmp_path / "model.gguf", "f16")
    keys, _ = read(tmp_path / "model.gguf")
    tokenizer, definition = Tokenizer.load(folder), json.loads((folder / "tokenizer.json").read_text())
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(set(tokens)) == 320
    assert all(tokens[number] == token and types[number] == 1 for token, number in definition["model"]["vocab"].items())
    for token in ADDED_TOKENS:
        number = tokenizer.added_tokens[token]
        assert tokens[number] == token and types[number] == (3 if number in tokenizer.special_ids else 4)
    assert set(types[tokenizer.vocab_size:]) == {5} and len(types[tokenizer.vocab_size:]) == 320 - tokenizer.vocab_size > 0
    assert [merge.split(" ") for merge in keys["tokenizer.ggml.merges"]] == [list(merge) for merge in definition["model"]["merges"]]
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "bailingmoe2")
    ids = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    assert ids == {"bos": tokenizer.id_of("<|startoftext|>"), "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    assert keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.chat_template"] == tokenizer.chat_template


def test_another_split_of_text_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(made_model(SMALL.replace(vocab_size=320)), SMALL.replace(vocab_size=320), tmp_path / "model", tokenizer_folder=folder)
    path = tmp_path / "model" / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    path.write_text(json.dumps(definition))
    export_folder(tmp_path / "model", tmp_path / "model.gguf", "f16")
    assert read(tmp_path / "model.gguf")[0]["tokenizer.ggml.pre"] == "default"
    assert "token ids given directly are exact" in " ".join(capsys.readouterr().err.split())


def test_groups_that_choose_nothing_yarn_and_a_tied_head(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    config = CHAT.replace(topk_group=2, rope_scaling=scaling, tie_word_embeddings=True, num_experts_per_tok=1)
    model = initialize(LingForCausalLM(config), 0)
    export_model(model, tmp_path / "model.gguf", "f32")
    keys, tensors = read(tmp_path / "model.gguf")
    assert "bailingmoe2.expert_group_count" not in keys and "bailingmoe2.nextn_predict_layers" not in keys
    assert keys["bailingmoe2.expert_weights_norm"] is False
    assert [keys[f"bailingmoe2.rope.scaling.{key}"] for key in ("type", "factor", "original_context_length")] == ["yarn", 4.0, 32]
    assert torch.equal(values_of(tensors["output.weight"]), model.model.word_embeddings.weight.detach())
    assert keys["tokenizer.ggml.model"] == "none"


@pytest.mark.parametrize(("change", "named"), [
    ({"head_dim": 16}, "num_attention_heads x head_dim = 64"), ({"use_qk_norm": False}, "use_qk_norm"), ({"use_bias": True}, "use_bias"),
    ({"use_qkv_bias": True}, "use_qkv_bias"), ({"num_shared_experts": 0}, "num_shared_experts"),
    ({"num_experts": 2048}, "num_experts 2048"), ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, "rope_scaling"),
])
def test_what_llama_cpp_cannot_load_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        refuse_unloadable(CHAT.replace(**change), "model")


def test_values_beyond_f16_are_refused_and_fit_bf16(tmp_path: Path) -> None:
    model = made_model(CHAT)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = 1e5
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight: .* beyond what f16"):
        export_model(model, tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.iterdir())
    export_model(model, tmp_path / "model.gguf", "bf16")


def test_an_interrupted_write_leaves_nothing_and_an_old_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = made_model(CHAT), tmp_path / "model.gguf"
    export_model(model, target, "bf16")
    before, calls = target.read_bytes(), 0

    def interrupted(*arguments: Any) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return encode(*arguments)

    encode = export.encode
    monkeypatch.setattr(export, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(model, tmp_path / "new.gguf", "f32")
    calls = 0
    with pytest.raises(KeyboardInterrupt):
        export_model(model, target, "f32", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"] and target.read_bytes() == before


def test_an_existing_file_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        export_model(made_model(CHAT), tmp_path / "model.gguf", "bf16")
    usage = export.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="free some space"):
        export_model(made_model(CHAT), tmp_path / "other.gguf", "bf16")
    assert (tmp_path / "model.gguf").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_writing_needs_no_second_copy_of_the_model(tmp_path: Path) -> None:
    config = CHAT.replace(num_hidden_layers=6, vocab_size=256, hidden_size=128, head_dim=32, num_experts=32, moe_intermediate_size=64)
    model = initialize(LingForCausalLM(config), 0).to(torch.bfloat16)
    stack = 32 * 64 * 128 * 2
    tracemalloc.start()
    try:
        export_model(model, tmp_path / "model.gguf", "bf16")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "model.gguf").stat().st_size > 12 * stack
    assert stack < peak < 3 * stack  # numpy's memory: it sees at least the stack that is being written


def test_the_verb_writes_the_file_and_says_what_is_missing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), "--to", "gguf-q8_0", "--out", str(tmp_path / "model.gguf")]) == 0
    assert read(tmp_path / "model.gguf")[0]["general.file_type"] == 7
    assert main(["convert", str(folder), "--to", "gguf-q8_0", "--out", str(tmp_path / "model.gguf")]) == 1
    assert "exists already" in capsys.readouterr().err
