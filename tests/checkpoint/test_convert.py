"""Folder to folder without a model: dtype, shard size, MTP; and a peak memory of about a shard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparseling.checkpoint.convert import convert_folder
from sparseling.checkpoint.hf import load_model, plan_of, read_tensors, save_model
from sparseling.errors import UserError

from .checkpoint_samples import CHAT, SMALL, files_of, made_model, public_tensors, same_weights, write_public, write_tokenizer


def test_to_float32_and_back_to_bfloat16_in_other_shards_is_byte_identical(tmp_path: Path) -> None:
    save_model(made_model(), SMALL, tmp_path / "source", write_tokenizer(tmp_path / "tokenizer"), max_shard_bytes=20_000)
    convert_folder(tmp_path / "source", tmp_path / "wide", torch.float32, max_shard_bytes=50_000)
    convert_folder(tmp_path / "wide", tmp_path / "back", torch.bfloat16, max_shard_bytes=20_000)
    assert files_of(tmp_path / "back") == files_of(tmp_path / "source")
    assert all(tensor.dtype == torch.float32 for _, tensor in read_tensors(tmp_path / "wide"))


def test_conversion_rounds_as_the_model_does(tmp_path: Path) -> None:
    write_public(tmp_path / "source", SMALL, public_tensors(made_model()))
    convert_folder(tmp_path / "source", tmp_path / "out", torch.bfloat16)
    assert same_weights(load_model(tmp_path / "out"), made_model().to(torch.bfloat16))


def test_unknown_config_keys_scripts_and_licence_come_along_but_weights_do_not(tmp_path: Path) -> None:
    source = write_public(tmp_path / "source", CHAT, public_tensors(made_model(CHAT)), future_key=[1, 2])
    for name in ("modeling_bailing_moe_v2.py", "LICENSE", "chat_template.jinja", "pytorch_model.bin", "old.safetensors"):
        (source / name).write_text(name)
    convert_folder(source, tmp_path / "out", torch.bfloat16)
    names = set(files_of(tmp_path / "out"))
    assert {"modeling_bailing_moe_v2.py", "LICENSE", "chat_template.jinja"} < names
    assert not names & {"pytorch_model.bin", "old.safetensors", "model.safetensors"}
    public = json.loads((tmp_path / "out" / "config.json").read_text())
    assert public["future_key"] == [1, 2] and public["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("layers_in_config", [3, 4])  # Ling-V2 and Ring-V2 numbering
def test_leaving_mtp_out_gives_a_chat_checkpoint(tmp_path: Path, layers_in_config: int) -> None:
    write_public(tmp_path / "source", SMALL, public_tensors(made_model()), num_hidden_layers=layers_in_config)
    convert_folder(tmp_path / "source", tmp_path / "out", mtp=False)
    assert load_model(tmp_path / "out").config == CHAT
    assert {n: t.sum() for n, t in read_tensors(tmp_path / "out")} == {
        n: t.sum() for n, t in public_tensors(made_model()).items() if ".layers.3." not in n
    }
    assert "num_nextn_predict_layers" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("layers_in_config", [3, 4])
def test_numbering_of_mtp_layers_survives(tmp_path: Path, layers_in_config: int) -> None:
    write_public(tmp_path / "source", SMALL, public_tensors(made_model()), num_hidden_layers=layers_in_config)
    convert_folder(tmp_path / "source", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == layers_in_config
    assert same_weights(load_model(tmp_path / "out"), made_model())


def test_target_must_be_new_and_a_folder_can_replace_itself(tmp_path: Path) -> None:
    write_public(tmp_path / "model", CHAT, public_tensors(made_model(CHAT)))
    with pytest.raises(UserError, match="exists already"):
        convert_folder(tmp_path / "model", tmp_path / "model")
    convert_folder(tmp_path / "model", tmp_path / "model", overwrite=True)
    assert same_weights(load_model(tmp_path / "model"), made_model(CHAT))


MEASURE = """
import sys, torch
from pathlib import Path
from sparseling.checkpoint.convert import convert_folder
from sparseling.checkpoint.merge import merge_folders
from sparseling.checkpoint.hf import load_model

def memory_bytes(key):  # VmRSS: resident now, VmHWM: its peak. (ru_maxrss starts at the peak of the process that started this one.)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024

folder, shard = Path(sys.argv[1]), int(sys.argv[2])
for out in ("a", "b"):  # everything is imported and warm before the baseline
    convert_folder(folder / "tiny", folder / ("tiny" + out), torch.float32)
merge_folders([folder / "tinya", folder / "tinyb"], [0.5, 0.5], folder / "tinyc")
load_model(folder / "tiny")
before = memory_bytes("VmRSS")  # the peak of the imports may be above it: what is printed is never too small
convert_folder(folder / "large", folder / "bfloat16", torch.bfloat16, max_shard_bytes=shard)
print(memory_bytes("VmHWM") - before)
merge_folders([folder / "large"] * 2, [0.25, 0.75], folder / "merged", max_shard_bytes=shard)
print(memory_bytes("VmHWM") - before)
load_model(folder / "large")
print(memory_bytes("VmHWM") - before)
print(int("torch._dynamo" in sys.modules))
"""


linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured through /proc")


@dataclass(frozen=True)
class Peaks:
    """Bytes: one shard, the whole made checkpoint, and how far a new process's peak memory rose by the end of each step.

    `compiler`: 1 when torch's compiler was imported on the way.
    """

    shard: int
    total: int
    convert: int
    merge: int
    load: int
    compiler: int


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> Peaks:
    """Convert, merge and load a made checkpoint of many shards in a new process."""
    folder = tmp_path_factory.mktemp("memory")
    config = CHAT.replace(
        num_hidden_layers=6, vocab_size=1024, hidden_size=512, intermediate_size=1024, num_experts=16, moe_intermediate_size=256,
        head_dim=64, num_attention_heads=8, num_key_value_heads=4,
    )
    plan = plan_of(config, torch.float32)
    shard, total = 8 * 2**20, sum(tensor.size_bytes for tensor in plan.values())
    tensors = ((name, torch.full(tensor.shape, 0.5)) for name, tensor in plan.items())
    save_model(tensors, config, folder / "large", dtype=torch.float32, max_shard_bytes=shard)
    write_public(folder / "tiny", CHAT, public_tensors(made_model(CHAT)))
    # glibc keeps some freed blocks of megabytes for itself; with a fixed threshold they go back at once and the peak is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(folder), str(shard)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shutil.rmtree(folder)
    return Peaks(shard, total, *map(int, done.stdout.split()))


@linux
def test_converting_and_merging_need_about_a_shard_of_memory(peaks: Peaks) -> None:
    assert peaks.total > 15 * peaks.shard
    assert peaks.convert < 2.5 * peaks.shard
    assert peaks.merge < 2.5 * peaks.shard


@linux
def test_loading_needs_the_model_and_about_a_shard(peaks: Peaks) -> None:
    assert 0.9 * peaks.total < peaks.load < peaks.total + 2.5 * peaks.shard  # the lower bound shows that tensors are seen


@linux
def test_loading_does_not_pull_in_torchs_compiler(peaks: Peaks) -> None:
    """It would cost seconds before the first word of a chat."""
    assert peaks.compiler == 0
