"""What `load` gives back, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sparseling.config import ModelConfig
from sparseling.data.tokenizer import train_tokenizer
from sparseling.errors import UserError
from sparseling.run import load as load_module
from sparseling.run.load import load, stop_ids_of


def test_a_small_model_runs_in_float32_on_a_cpu_and_a_large_one_as_stored(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, tokenizer = load(model_folder, device="cpu")
    assert small.lm_head.weight.dtype == torch.float32 and not small.training
    monkeypatch.setattr(load_module, "FLOAT32_PARAMETERS", 1000)
    large, _ = load(model_folder, device="cpu")
    assert large.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(large.lm_head.weight.float(), small.lm_head.weight), "the same weights, bf16 as on disk"
    assert load(model_folder, torch.float32, "cpu")[0].lm_head.weight.dtype == torch.float32
    assert stop_ids_of(tokenizer) == (tokenizer.id_of("<|endoftext|>"), tokenizer.id_of("<|role_end|>"))


def test_the_mtp_layers_stay_on_disk(model_folder: Path) -> None:
    assert ModelConfig.from_folder(model_folder).num_nextn_predict_layers == 1
    model, _ = load(model_folder, device="cpu")
    assert model.config.num_nextn_predict_layers == 0 and len(model.model.layers) == model.config.num_hidden_layers


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    train_tokenizer(["".join(map(chr, range(0x4E00, 0x5600)))], 500, tmp_path / "model")
    with pytest.raises(UserError, match="the tokenizer has 500 tokens, the model 400"):
        load(tmp_path / "model")


def test_a_name_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load("no/such/folder")
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load(tmp_path)
