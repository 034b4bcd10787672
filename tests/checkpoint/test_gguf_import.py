"""GGUF back to a public folder: weights, config and tokenizer return; damaged and foreign files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparseling.checkpoint.gguf import export_folder, export_model
from sparseling.checkpoint.gguf_import import import_gguf
from sparseling.checkpoint.hf import load_model, save_model
from sparseling.cli import main
from sparseling.data.tokenizer import Tokenizer, train_tokenizer
from sparseling.errors import UserError

from .checkpoint_samples import CHAT, SMALL, made_model, same_weights

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra [gguf])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(["detailed thinking on, Größe 数 ünï\nHow many?"] * 20, 300, made / "tokenizer")
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
    config = SMALL.replace(vocab_size=320, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, rope_scaling=scaling)
    save_model(made_model(config), config, made / "model", tokenizer_folder=made / "tokenizer", dtype=torch.float32)
    return made / "model"


def test_f32_comes_back_bit_for_bit_with_config_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    export_folder(folder, tmp_path / "model.gguf", "f32")
    import_gguf(tmp_path / "model.gguf", tmp_path / "back", torch.float32)
    first, second = load_model(folder), load_model(tmp_path / "back")
    assert second.config == first.config.replace(initializer_range=second.config.initializer_range) and same_weights(first, second)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((folder / name).read_text()), name
    text = "<role>HUMAN</role>Größe 12 <tool_call>\n数"
    one, other = Tokenizer.load(folder), Tokenizer.load(tmp_path / "back")
    assert one.encode(text, True) == other.encode(text, True) and one.encode(text) == other.encode(text)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_other_types_come_back_as_they_were_written(folder: Path, tmp_path: Path, kind: str) -> None:
    """What was rounded once is not rounded again: a second export writes the same bytes."""
    export_folder(folder, tmp_path / "first.gguf", kind)
    import_gguf(tmp_path / "first.gguf", tmp_path / "back", torch.float32)
    export_folder(tmp_path / "back", tmp_path / "second.gguf", kind)
    first, second = ({t.name: t for t in gguf.GGUFReader(tmp_path / f"{which}.gguf").tensors} for which in ("first", "second"))
    for name, tensor in first.items():
        one, other = (torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in (tensor, second[name]))
        assert torch.allclose(one, other, rtol=2e-3 if kind[0] == "q" else 0, atol=0), name


def test_the_verb_reads_a_file_and_says_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_folder(folder, tmp_path / "model.gguf", "bf16")
    assert main(["convert", str(tmp_path / "model.gguf"), "--out", str(tmp_path / "back")]) == 0
    assert same_weights(load_model(tmp_path / "back"), load_model(folder).to(torch.bfloat16))
    assert main(["convert", str(tmp_path / "absent.gguf"), "--out", str(tmp_path / "other")]) == 1
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [3, 100, 2000, -1000])
def test_files_cut_short_are_refused(folder: Path, tmp_path: Path, kept: int) -> None:
    export_folder(folder, tmp_path / "model.gguf", "bf16")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:kept])
    with pytest.raises(UserError, match=r"cut\.gguf: "):
        import_gguf(tmp_path / "cut.gguf", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_architecture_and_a_missing_tensor_are_refused(tmp_path: Path) -> None:
    export_model(made_model(CHAT), tmp_path / "model.gguf", "f32")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "llama.gguf").write_bytes(data.replace(b"bailingmoe2", b"bailingmoe3"))
    with pytest.raises(UserError, match="architecture 'bailingmoe3'"):
        import_gguf(tmp_path / "llama.gguf", tmp_path / "back")
    (tmp_path / "renamed.gguf").write_bytes(data.replace(b"blk.1.ffn_norm", b"blk.1.ffn_harm"))
    with pytest.raises(UserError, match=r"1 tensor missing \(blk\.1\.ffn_norm\.weight\); 1 tensor not known"):
        import_gguf(tmp_path / "renamed.gguf", tmp_path / "back")
