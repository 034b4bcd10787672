"""Packed folders: the same bits as packing in memory, complete or not there, and refused when they are not what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseling.checkpoint.fp8 import dequantize_blocks, quantize_blocks
from sparseling.checkpoint.hf import empty_model, load_model, open_checkpoint, read_tensors, save_model, without_mtp
from sparseling.cli import main
from sparseling.config import ModelConfig, preset
from sparseling.errors import UserError
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.run import packed_folder
from sparseling.run.engine import Engine, why_not
from sparseling.run.load import load
from sparseling.run.open import open_engine, source_of_folder
from sparseling.run.pack_folder import pack_folder
from sparseling.run.packed import Kind, Packed
from sparseling.run.packed_folder import MANIFEST, check_hashes, is_packed, layout, open_packed, source_of_packed
from sparseling.run.parts import Part, plan_parts
from sparseling.run.source import Source, source_of_checkpoint, source_of_model

SMALL = preset("nano").replace(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_experts=20, num_experts_per_tok=3, n_group=4,
    topk_group=2, max_position_embeddings=128, num_nextn_predict_layers=1, initializer_range=0.1,
)
KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8", "int4")

if (reason := why_not(SMALL)) is not None:
    pytest.skip(reason, allow_module_level=True)


def model_of(config: ModelConfig = SMALL) -> LingForCausalLM:
    model = initialize(LingForCausalLM(config), 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 1:
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public") / "model"
    save_model(model_of(), SMALL, folder, max_shard_bytes=200_000)
    return folder


@pytest.fixture(scope="module")
def packed(public: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "int4"
    pack_folder(public, folder, "int4")
    return folder


def bits(part: Part) -> list[torch.Tensor]:
    """Everything of a part as bytes."""
    tensors = [part.data, part.scales] if isinstance(part, Packed) else [part]
    return [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]


def same_parts(first: Source, second: Source) -> bool:
    ours, theirs = dict(first.parts), dict(second.parts)
    return ours.keys() == theirs.keys() and all(
        torch.equal(a, b) for name in ours for a, b in zip(bits(ours[name]), bits(theirs[name]), strict=True))


def logits(engine: Engine) -> torch.Tensor:
    ids = torch.randint(0, SMALL.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    tables = torch.arange(3, dtype=torch.int32)[None]
    return engine.step(ids, torch.arange(40), torch.zeros(40, dtype=torch.int64), tables, torch.arange(40)).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preload", [False, True])
def test_a_packed_folder_holds_the_bits_that_packing_in_memory_gives(public: Path, tmp_path: Path, kind: Kind, preload: bool) -> None:
    pack_folder(public, tmp_path / "out", kind)
    check_hashes(open_packed(tmp_path / "out"))
    assert same_parts(source_of_packed(open_packed(tmp_path / "out"), preload), source_of_checkpoint(open_checkpoint(public), kind))
    mapped, memory = open_engine(tmp_path / "out", preload=preload), Engine(source_of_model(load_model(public), kind), 4)
    assert torch.equal(logits(mapped), logits(memory)) and mapped.weight_bytes == memory.weight_bytes


@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": True}, {"num_shared_experts": 0}, {"use_qkv_bias": True, "use_bias": True}, {"use_qk_norm": False},
    {"first_k_dense_replace": 0}, {"num_nextn_predict_layers": 0, "vocab_size": 17},
])
def test_every_option_of_the_config_survives(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = SMALL.replace(**changes)
    model = model_of(config)
    save_model(model, config, tmp_path / "model", dtype=torch.float32)
    pack_folder(tmp_path / "model", tmp_path / "out", "int8")
    opened = open_packed(tmp_path / "out")
    assert opened.config == config
    assert same_parts(source_of_packed(opened), source_of_model(model, "int8"))


def test_mtp_layers_come_along_under_names_of_their_own(packed: Path, public: Path) -> None:
    parts = dict(source_of_packed(open_packed(packed)).parts)
    assert {"mtp.0.eh_proj", "mtp.0.enorm", "mtp.0.hnorm", "mtp.0.final_norm", "mtp.0.router", "mtp.0.gate_up"} < parts.keys()
    norm = parts["mtp.0.enorm"]
    assert isinstance(norm, torch.Tensor)
    assert torch.equal(norm, load_model(public).state_dict()["model.layers.3.enorm.weight"].float())


def test_router_norms_and_bias_are_fp32_and_the_embedding_as_stored(packed: Path) -> None:
    parts = dict(source_of_packed(open_packed(packed)).parts)
    kinds = {name.rpartition(".")[2]: part.kind for name, part in parts.items() if isinstance(part, Packed)}
    assert kinds.pop("router") == "fp32" and set(kinds.values()) == {"int4"}
    dtypes = {name: part.dtype for name, part in parts.items() if not isinstance(part, Packed)}
    assert dtypes.pop("embedding") == torch.bfloat16 and set(dtypes.values()) == {torch.float32}


def test_packing_at_load_streams_and_equals_the_model_in_memory(public: Path) -> None:
    for kind in KINDS:
        assert same_parts(source_of_folder(public, kind), source_of_model(load_model(public), kind))
    assert open_engine(public).kind == "fp32", "a small model is as exact as can be"


def test_fp8_weights_are_multiplied_out_first(public: Path, tmp_path: Path) -> None:
    tensors = dict(read_tensors(public))
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    codes, scales = quantize_blocks(tensors[name].float())
    plain = {**tensors, name: dequantize_blocks(codes, scales)}
    for folder, weights in (("plain", plain), ("fp8", {**tensors, name: codes, name + "_scale_inv": scales})):
        shutil.copytree(public, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / folder / "model.safetensors")
    change("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "config.json")(tmp_path / "fp8")
    for folder in ("plain", "fp8"):
        pack_folder(tmp_path / folder, tmp_path / f"{folder}-int4", "int4")
    assert same_parts(*(source_of_packed(open_packed(tmp_path / f"{folder}-int4")) for folder in ("plain", "fp8")))
    assert "quantization_config" not in json.loads((tmp_path / "fp8-int4" / "config.json").read_text())


def test_parts_lie_on_pages_and_do_not_overlap() -> None:
    config = SMALL.replace(hidden_size=2048, vocab_size=3000, moe_intermediate_size=512)
    places = layout(plan_parts(config, "int8"), torch.bfloat16)
    for file in {place.file for place in places.values()}:
        inside = [place for place in places.values() if place.file == file]
        ends = [0, *(place.end for place in inside)]
        assert all(place.offset >= end for place, end in zip(inside, ends, strict=False))
        assert all(place.offset % (2 << 20 if place.size >= 2 << 20 else 4096) == 0 and place.scale_offset % 64 == 0 for place in inside)


def test_an_interrupted_conversion_leaves_nothing(public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, written = packed_folder.write_part, []

    def write_part(file: packed_folder.HashedFile, places: dict[str, packed_folder.Place], name: str, part: Part) -> None:
        written.append(name)
        if len(written) > 20:
            raise KeyboardInterrupt
        original(file, places, name, part)

    monkeypatch.setattr(packed_folder, "write_part", write_part)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(public, tmp_path / "out", "int4")
    assert not list(tmp_path.iterdir())


def cut(folder: Path) -> None:
    os.truncate(folder / "layer-00001.packed", (folder / "layer-00001.packed").stat().st_size - 1)


def change(key: str, value: object, file: str = MANIFEST) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content[key] = value
        (folder / file).write_text(json.dumps(content))

    return changed


@pytest.mark.parametrize(("damage", "message"), [
    (cut, r"layer-00001.packed: has [\d,]+ bytes instead of [\d,]+; copy it again"),
    (lambda folder: (folder / "outer.packed").unlink(), "outer.packed: is missing"),
    (lambda folder: (folder / "outer.packed").write_bytes(b""), "outer.packed: has 0 bytes"),
    (lambda folder: (folder / MANIFEST).write_text("{"), "not valid JSON"),
    (lambda folder: (folder / MANIFEST).write_text("[]"), "is not what sparseling convert writes"),
    (change("version", 2), "has version 2, this program reads 1"),
    (change("version", None), "has version None"),
    (change("kind", "int3"), "of kind 'int3' are not known"),
    (change("kind", ["int4"]), "are not known"),
    (change("kind", "int8"), "its files are not those of a model such as config.json describes"),
    (change("embedding", "float16"), "embedding of dtype 'float16' is not known"),
    (change("files", 3), "is not what sparseling convert writes"),
    (change("files", {"../outer.packed": {"bytes": 3}}), "its files are not those"),
    (change("files", {"outer.packed": 3}), "its files are not those"),
    (change("hidden_size", 96, "config.json"), "its files are not those"),
    (change("num_hidden_layers", 4, "config.json"), "its files are not those"),
    (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
])
def test_a_damaged_folder_is_refused_at_once(packed: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(packed, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        open_engine(folder)


def test_a_file_that_shrinks_after_it_was_looked_at_is_refused_too(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "model")
    opened = open_packed(tmp_path / "model")
    cut(tmp_path / "model")
    with pytest.raises(UserError, match="cannot be mapped"):
        Engine(source_of_packed(opened), 4)


def test_changed_bytes_are_found_by_their_hash(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "model")
    check_hashes(open_packed(tmp_path / "model"))
    with open(tmp_path / "model" / "layer-00002.packed", "rb+") as stream:
        stream.seek(5000)
        byte = stream.read(1)
        stream.seek(5000)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match=r"layer-00002.packed: its bytes have changed"):
        check_hashes(open_packed(tmp_path / "model"))


def test_what_cannot_be_done_is_said(packed: Path, public: Path, tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(UserError, match="packed in int4, not int8; convert the model it came from"):
        open_engine(packed, "int8")
    with pytest.raises(UserError, match="is packed already"):
        pack_folder(packed, tmp_path / "again", "int8")
    for reading in (load_model, open_checkpoint):
        with pytest.raises(UserError, match="is packed for the native engine, which alone can read it"):
            reading(packed)
    with pytest.raises(UserError, match="exists already"):
        pack_folder(public, packed, "int4")
    if why_not(ModelConfig.from_folder(model_folder)) is not None:
        with pytest.raises(UserError, match="the native engine cannot run it: head_dim 8"):
            pack_folder(model_folder, tmp_path / "out", "int4")
        assert main(["chat", str(model_folder), "hi", "--weights", "int8"]) == 1
    else:
        pack_folder(model_folder, tmp_path / "out", "int4")
        with pytest.raises(UserError, match="is packed for the native engine"):
            load(tmp_path / "out")


def test_the_command_line_packs_reports_quality_and_chats(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if why_not(ModelConfig.from_folder(model_folder)) is not None:
        return
    text = tmp_path / "text.txt"
    text.write_text("How many? detailed thinking on and off. " * 20)
    out = tmp_path / "int8"
    assert main(["convert", str(model_folder), "--to", "int8", "--out", str(out), "--quality", str(text)]) == 0
    printed = capfd.readouterr().out
    assert "int8 against bf16" in printed and "perplexity" in printed and is_packed(out)
    quality = json.loads((out / "quality.json").read_text())
    assert quality["perplexity"] == pytest.approx(quality["reference_perplexity"], rel=0.1) and 0 < quality["divergence"] < 0.1
    answers = []
    for arguments in ([str(out)], [str(model_folder), "--weights", "int8"]):
        assert main(["chat", *arguments, "How many?", "--max-new-tokens", "8", "--threads", "1", "--temperature", "0"]) == 0
        answers.append(capfd.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["convert", str(model_folder), "--out", str(tmp_path / "x"), "--quality", str(text)]) == 2
    assert "--to int8" in capfd.readouterr().err


def test_mtp_layers_come_when_they_are_wanted(public: Path) -> None:
    for mtp in (True, False):
        names = [name for name, _ in source_of_folder(public, "int4", mtp=mtp).parts]
        assert any(name.startswith("mtp.") for name in names) == mtp
        assert open_engine(public, mtp=mtp).ahead == mtp
    assert without_mtp(open_checkpoint(public)).config.num_nextn_predict_layers == 0


MEASURE = """
import sys, torch
from pathlib import Path
from sparseling.run.open import open_engine
from sparseling.run.pack_folder import pack_folder

def memory_bytes(key):  # VmRSS: resident now, VmHWM: its peak
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

folder = Path(sys.argv[1])
pack_folder(folder / "tiny", folder / "warm", "int4")
open_engine(folder / "tiny", "int4")
before = memory_bytes("VmRSS")
pack_folder(folder / "large", folder / "packed", "int4")
packing = memory_bytes("VmHWM") - before
engine = open_engine(folder / "large", "int4", pages=2)
print(packing, memory_bytes("VmHWM") - before, engine.weight_bytes)
"""


def test_memory_is_a_part_when_packing_to_disk_and_the_packed_weights_when_packing_at_load(public: Path, tmp_path: Path) -> None:
    config = SMALL.replace(hidden_size=512, num_hidden_layers=6, num_experts=16, moe_intermediate_size=512, num_nextn_predict_layers=0)
    save_model(empty_model(config, torch.bfloat16), config, tmp_path / "large")
    shutil.copytree(public, tmp_path / "tiny")
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True)
    packing, loading, weights = map(int, run.stdout.split())
    one_layer = 16 * 3 * 512 * 512 * 9 // 16
    stored = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert 5 * one_layer < weights < stored / 3.4
    assert packing < 3 * one_layer, "not the whole model"
    assert loading < weights + 2 * one_layer, "not the model in bf16"
