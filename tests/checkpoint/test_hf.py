"""Public folders both ways: byte-identical round trip, both MTP numberings, errors that name tensors, saves that are whole or absent."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseling.checkpoint.hf import load_into, load_model, open_checkpoint, read_tensors, save_model
from sparseling.config import ModelConfig
from sparseling.errors import UserError

from .checkpoint_samples import (
    CHAT,
    GOLDEN,
    SMALL,
    files_of,
    made_model,
    public_tensors,
    same_weights,
    write_public,
    write_sharded,
    write_tokenizer,
)

INDEX = "model.safetensors.index.json"
ONE_SHARD = "model-00001-of-00001.safetensors"


# --- Round trip ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("golden", "dtype"), [("fp32", torch.float32), ("fp32-mtp", torch.float32), ("bf16", torch.bfloat16)])
def test_round_trip_of_the_public_implementations_file_is_byte_identical(tmp_path: Path, golden: str, dtype: torch.dtype) -> None:
    model = load_model(GOLDEN / golden)
    save_model(model, model.config, tmp_path / "out", dtype=dtype)
    assert (tmp_path / "out" / ONE_SHARD).read_bytes() == (GOLDEN / golden / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_of_a_sharded_folder_is_byte_identical(tmp_path: Path, dtype: torch.dtype) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    save_model(made_model(), SMALL, tmp_path / "first", tokenizer, dtype, max_shard_bytes=20_000)
    model = load_model(tmp_path / "first")
    save_model(model, model.config, tmp_path / "second", tmp_path / "first", dtype, max_shard_bytes=20_000)
    first, second = files_of(tmp_path / "first"), files_of(tmp_path / "second")
    assert len(first) > 10
    assert first == second


def test_tensors_in_any_order_give_the_same_bytes(tmp_path: Path) -> None:
    save_model(made_model(), SMALL, tmp_path / "model", max_shard_bytes=20_000)
    pairs = list(read_tensors(tmp_path / "model"))
    random.Random(3).shuffle(pairs)
    save_model(iter(pairs), SMALL, tmp_path / "tensors", max_shard_bytes=20_000)
    assert files_of(tmp_path / "model") == files_of(tmp_path / "tensors")


def test_each_shard_equals_what_the_safetensors_library_writes_and_the_index_is_right(tmp_path: Path) -> None:
    save_model(made_model(), SMALL, tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=20_000)
    expected = public_tensors(made_model(), torch.bfloat16)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert index["weight_map"].keys() == expected.keys()
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)] and len(shards) > 5
    for shard in shards:
        part = {name: expected[name] for name, file in index["weight_map"].items() if file == shard}
        assert sum(tensor.nbytes for tensor in part.values()) <= 20_000
        save_file(part, tmp_path / "reference", metadata={"format": "pt"})
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "reference").read_bytes()


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    save_model(made_model(CHAT), CHAT, tmp_path / "out", max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(public_tensors(made_model(CHAT)))
    assert same_weights(load_model(tmp_path / "out"), made_model(CHAT).to(torch.bfloat16))


def test_config_is_the_public_spelling_with_the_dtype_and_generation_stops_at_both_ends(tmp_path: Path) -> None:
    save_model(made_model(), SMALL, tmp_path / "out", write_tokenizer(tmp_path / "tokenizer"))
    public = json.loads((tmp_path / "out" / "config.json").read_text())
    assert public["torch_dtype"] == "bfloat16" and public["architectures"] == ["BailingMoeV2ForCausalLM"]
    assert ModelConfig.from_folder(tmp_path / "out") == SMALL
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 1] and generation["pad_token_id"] == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()


# --- Loading ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 7])
def test_loaded_model_has_the_stored_weights(tmp_path: Path, shards: int) -> None:
    write_sharded(tmp_path, SMALL, public_tensors(made_model()), shards)
    assert same_weights(load_model(tmp_path), made_model())


def test_expert_bias_stays_float32_in_every_dtype(tmp_path: Path) -> None:
    original = made_model()
    write_public(tmp_path / "fp32", SMALL, public_tensors(original))
    model = load_model(tmp_path / "fp32", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == model.routers()[0].weight.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
    for ours, exact in zip(model.routers(), original.routers(), strict=True):
        assert ours.expert_bias.dtype == torch.float32 and torch.equal(ours.expert_bias, exact.expert_bias)
    save_model(model, SMALL, tmp_path / "bf16", dtype=torch.bfloat16)
    stored = dict(read_tensors(tmp_path / "bf16"))
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {n for n in stored if n.endswith("expert_bias")}
    assert torch.equal(stored["model.layers.1.mlp.gate.expert_bias"], original.routers()[0].expert_bias)


def test_load_into_overwrites_in_the_models_dtype(tmp_path: Path) -> None:
    write_public(tmp_path, SMALL, public_tensors(made_model()))
    model, chat = made_model(seed=1).to(torch.bfloat16), made_model(CHAT, seed=1)
    load_into(model, tmp_path)
    assert same_weights(model, made_model().to(torch.bfloat16))
    load_into(chat, tmp_path)  # the MTP tensors of the folder are skipped
    assert torch.equal(chat.lm_head.weight, made_model().lm_head.weight)


def test_load_into_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    write_public(tmp_path, SMALL, public_tensors(made_model()))
    other = made_model(SMALL.replace(vocab_size=81), seed=1)
    with pytest.raises(UserError, match=r"word_embeddings.weight \[80, 32\] instead of \[81, 32\]"):
        load_into(other, tmp_path)
    assert same_weights(other, made_model(SMALL.replace(vocab_size=81), seed=1))


# --- MTP ----------------------------------------------------------------------------------------------------------------------


def test_both_mtp_numberings_load_as_the_same_model(tmp_path: Path) -> None:
    config = SMALL.replace(num_nextn_predict_layers=2)
    tensors = public_tensors(made_model(config))
    write_public(tmp_path / "ling", config, tensors)
    write_public(tmp_path / "ring", config, tensors, num_hidden_layers=5)  # MTP layers counted in
    ling, ring = load_model(tmp_path / "ling"), load_model(tmp_path / "ring")
    assert ring.config == ling.config == config
    assert same_weights(ling, ring)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        ours, theirs = (model(ids, with_mtp=True) for model in (ring, made_model(config)))
    assert torch.equal(ours.hidden_states, theirs.hidden_states)
    assert torch.equal(ours.mtp_hidden_states[1], theirs.mtp_hidden_states[1])


@pytest.mark.parametrize("layers_in_config", [3, 4])
def test_with_mtp_off_the_mtp_tensors_are_skipped(tmp_path: Path, layers_in_config: int) -> None:
    write_public(tmp_path, SMALL, public_tensors(made_model()), num_hidden_layers=layers_in_config)
    model = load_model(tmp_path, mtp=False)
    assert model.config == CHAT and len(model.model.layers) == 3
    assert torch.equal(model.model.layers[2].mlp.gate.weight, made_model().model.layers[2].mlp.gate.weight)


def test_absent_mtp_is_fine_by_default_an_error_when_wanted_and_fresh_when_asked(tmp_path: Path) -> None:
    write_public(tmp_path, CHAT, public_tensors(made_model(CHAT)), num_nextn_predict_layers=1)
    assert load_model(tmp_path).config.num_nextn_predict_layers == 0
    with pytest.raises(UserError, match="has no MTP weights"):
        load_model(tmp_path, mtp=True)
    first, again = (load_model(tmp_path, mtp=True, mtp_seed=5) for _ in range(2))
    assert same_weights(first, again)
    assert first.config == SMALL
    assert torch.equal(first.lm_head.weight, made_model(CHAT).lm_head.weight)
    assert all(torch.isfinite(tensor).all() for tensor in first.state_dict().values())


def test_fresh_mtp_depends_on_its_seed(tmp_path: Path) -> None:
    write_public(tmp_path, CHAT, public_tensors(made_model(CHAT)))
    first, other = (load_model(tmp_path, mtp=True, mtp_seed=seed) for seed in (5, 6))
    assert not torch.equal(first.model.layers[3].eh_proj.weight, other.model.layers[3].eh_proj.weight)
    assert torch.equal(first.model.layers[2].mlp.gate.weight, other.model.layers[2].mlp.gate.weight)


def test_separate_mtp_checkpoint_numbered_zero(tmp_path: Path) -> None:
    tensors = public_tensors(made_model())
    ahead = {n.replace("layers.3.", "layers.0."): tensor for n, tensor in tensors.items() if ".layers.3." in n}
    shared = {"model.word_embeddings.weight": tensors["model.word_embeddings.weight"].clone()}
    write_public(tmp_path / "mtp", SMALL, ahead | shared, num_hidden_layers=1)
    write_public(tmp_path / "chat", CHAT, {n: tensor for n, tensor in tensors.items() if ".layers.3." not in n})
    assert same_weights(load_model(tmp_path / "chat", mtp_folder=tmp_path / "mtp"), made_model())
    with pytest.raises(UserError, match="has 0 MTP layers"):
        load_model(tmp_path / "chat", mtp_folder=tmp_path / "chat")
    del ahead["model.layers.0.hnorm.weight"]
    write_public(tmp_path / "broken", SMALL, ahead)
    with pytest.raises(UserError, match=r"1 tensor missing \(model.layers.3.hnorm.weight\)"):
        load_model(tmp_path / "chat", mtp_folder=tmp_path / "broken")


# --- Tied heads ---------------------------------------------------------------------------------------------------------------


def test_tied_head_is_written_once_and_stays_tied(tmp_path: Path) -> None:
    config = CHAT.replace(tie_word_embeddings=True)
    model = made_model(config)
    save_model(model, config, tmp_path / "out", dtype=torch.float32)
    assert "lm_head.weight" not in dict(read_tensors(tmp_path / "out"))
    again = load_model(tmp_path / "out")
    assert again.lm_head.weight is again.model.word_embeddings.weight
    assert same_weights(again, model)


def test_tied_checkpoint_may_store_a_copy_of_the_head_but_not_another_head(tmp_path: Path) -> None:
    config = CHAT.replace(tie_word_embeddings=True)
    tensors = public_tensors(made_model(config))
    assert torch.equal(tensors["lm_head.weight"], tensors["model.word_embeddings.weight"])
    write_public(tmp_path, config, tensors)
    assert same_weights(load_model(tmp_path), made_model(config))
    tensors["lm_head.weight"][0, 0] += 1
    write_public(tmp_path, config, tensors)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_model(tmp_path)


# --- Errors name tensors ------------------------------------------------------------------------------------------------------


def test_one_error_names_missing_extra_and_misshapen_tensors(tmp_path: Path) -> None:
    tensors = public_tensors(made_model(CHAT))
    for expert in range(5):
        del tensors[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(33)
    write_public(tmp_path, CHAT, tensors)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert "5 tensors missing (model.layers.1.mlp.experts.0.up_proj.weight, " in message and ", ...)" in message
    assert "1 tensor not part of the model (model.layers.0.self_attn.rotary_emb.inv_freq)" in message
    assert "1 tensor of another shape (model.norm.weight [33] instead of [32])" in message
    assert "\n" not in message


@pytest.mark.parametrize("lost", ["model.layers.3.eh_proj.weight", "model.layers.3.enorm.weight", "model.layers.2.attention.dense.weight"])
def test_incomplete_mtp_or_decoder_layer_is_named(tmp_path: Path, lost: str) -> None:
    tensors = public_tensors(made_model())
    del tensors[lost]
    write_public(tmp_path, SMALL, tensors)
    with pytest.raises(UserError, match="model.layers.3" if "layers.3" in lost else lost):
        load_model(tmp_path)


def bad_sources() -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    pairs = list(public_tensors(made_model(CHAT)).items())
    yield "model.norm.weight: missing", [pair for pair in pairs if pair[0] != "model.norm.weight"]
    yield "model.norm.weight: comes twice", [*pairs, ("model.norm.weight", torch.zeros(32))]
    yield "model.extra: is no tensor of this model", [("model.extra", torch.zeros(1)), *pairs]
    yield r"model.norm.weight: has shape \[31\], expected \[32\]", [("model.norm.weight", torch.zeros(31))]


@pytest.mark.parametrize(("message", "pairs"), list(bad_sources()))
def test_saving_the_wrong_tensors_names_them_and_leaves_no_folder(tmp_path: Path, message: str, pairs: list[tuple[str, Tensor]]) -> None:
    with pytest.raises(UserError, match=message):
        save_model(iter(pairs), CHAT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- Whole or absent ----------------------------------------------------------------------------------------------------------


def failing(pairs: list[tuple[str, Tensor]], error: BaseException) -> Iterator[tuple[str, Tensor]]:
    yield from pairs[: len(pairs) // 2]
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory"), OSError(28, "No space left on device")])
def test_a_save_that_fails_half_way_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    save_model(made_model(CHAT), CHAT, tmp_path / "out")
    before = files_of(tmp_path / "out")
    pairs = list(public_tensors(made_model(CHAT, seed=1)).items())
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        save_model(failing(pairs, error), CHAT, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_folder_is_kept_unless_overwrite(tmp_path: Path) -> None:
    save_model(made_model(CHAT), CHAT, tmp_path / "out")
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        save_model(made_model(CHAT, seed=1), CHAT, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    save_model(made_model(CHAT, seed=1), CHAT, tmp_path / "out", dtype=torch.float32, overwrite=True)
    assert same_weights(load_model(tmp_path / "out"), made_model(CHAT, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_killed_between_its_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(made_model(CHAT), CHAT, tmp_path / "out")
    before = files_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match="exists already"):
        save_model(made_model(CHAT, seed=1), CHAT, tmp_path / "out")
    assert files_of(tmp_path / "out") == before
    rename = os.replace

    def fail_on_the_new(source: Path, target: Path) -> None:
        if source.name == ".out.unfinished":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail_on_the_new)
    with pytest.raises(UserError, match="cannot be written"):
        save_model(made_model(CHAT, seed=1), CHAT, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / ONE_SHARD).write_bytes(b"half")
    save_model(made_model(CHAT), CHAT, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="free some space"):
        save_model(made_model(CHAT), CHAT, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not float16"):
        save_model(made_model(CHAT), CHAT, tmp_path / "out", dtype=torch.float16)


def test_missing_tokenizer_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        save_model(made_model(CHAT), CHAT, tmp_path / "out", tokenizer_folder=tmp_path / "nowhere")


def test_folder_handle_knows_dtype_without_reading_weights(tmp_path: Path) -> None:
    save_model(made_model(CHAT), CHAT, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").dtype == torch.bfloat16
    assert load_file(tmp_path / "out" / ONE_SHARD)["lm_head.weight"].dtype == torch.bfloat16
