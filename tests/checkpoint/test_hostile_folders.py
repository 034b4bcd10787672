"""Damaged and hostile folders: one sentence that names the file, nothing opened outside the folder, no pickle ever loaded."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseling.checkpoint.hf import load_model, read_tensors
from sparseling.checkpoint.tensor_files import list_tensors
from sparseling.errors import UserError

from .checkpoint_samples import CHAT, made_model, public_tensors, write_public, write_sharded

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "model", CHAT, public_tensors(made_model(CHAT)), 4)


def refused(folder: Path, *words: str) -> None:
    """Loading is refused in one line that has all `words`."""
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere: no such folder")
    refused(tmp_path, "neither model.safetensors nor")


def test_missing_config_is_named(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    refused(sharded, "config.json: no such file")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "\x00"])
def test_broken_config_is_named(sharded: Path, text: str) -> None:
    (sharded / "config.json").write_text(text)
    refused(sharded, "config.json: ")


def test_missing_shards_are_counted_and_the_first_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    (sharded / "model-00003-of-00004.safetensors").unlink()
    refused(sharded, "model-00002-of-00004.safetensors: 2 of 4 shard files are missing")


def test_broken_link_counts_as_missing(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00004.safetensors"
    shard.unlink()
    shard.symlink_to(sharded / "gone")
    refused(sharded, "model-00002-of-00004.safetensors: 1 of 4")


def test_links_into_a_cache_are_followed(sharded: Path, tmp_path: Path) -> None:
    """The Hugging Face cache is made of links to blobs in another folder."""
    for path in list(sharded.iterdir()):
        path.rename(tmp_path / f"blob-{path.name}")
        path.symlink_to(tmp_path / f"blob-{path.name}")
    assert load_model(sharded).config == CHAT


@pytest.mark.parametrize("keep", [0, 4, 8, 200, 0.5, -1])
def test_truncated_shard_is_named_at_every_length(sharded: Path, keep: float) -> None:
    shard = sharded / "model-00003-of-00004.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(sharded, "model-00003-of-00004.safetensors: damaged or cut short")


def header_bytes(entries: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


HOSTILE_FILES = {
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header is not JSON": struct.pack("<Q", 4) + b"abcd",
    "offsets beyond the data": header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}, b"\0" * 8),
    "offsets backwards": header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
    "shape larger than the bytes": header_bytes({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, b"\0" * 8),
    "shape that overflows": header_bytes({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}}, b"\0" * 8),
    "negative shape": header_bytes({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "unknown dtype": header_bytes({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "trailing bytes": header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 99),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile_headers_are_refused(tmp_path: Path, kind: str) -> None:
    write_public(tmp_path, CHAT, {"a": torch.zeros(2)})
    (tmp_path / "model.safetensors").write_bytes(HOSTILE_FILES[kind])
    refused(tmp_path, "model.safetensors: damaged or cut short")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = public_tensors(made_model(CHAT))
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int32)
    write_public(tmp_path, CHAT, tensors)
    refused(tmp_path, "model.safetensors: model.norm.weight is stored as I32")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "", ".", "x.bin", "..\\x.safetensors", "x/../../x.safetensors"],
)
def test_index_that_leads_out_of_the_folder_is_refused_unread(sharded: Path, shard: str) -> None:
    save_file({"lm_head.weight": torch.zeros(80, 32)}, sharded.parent / "x.safetensors")  # it would be found
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"lists '{shard}', which is not a safetensors file of the same folder")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": {"a": None}}])
def test_index_without_a_weight_map_is_refused(sharded: Path, index: object) -> None:
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"{INDEX}: has no weight_map")


def test_index_that_is_not_json_is_named(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {"lm_head')
    refused(sharded, f"{INDEX}: not valid JSON")


def test_tensor_that_the_index_lists_but_the_shard_lacks_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.ghost"] = "model-00001-of-00004.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "model-00001-of-00004.safetensors: lacks model.ghost")


def test_single_file_beside_an_index_that_does_not_know_it_is_ambiguous(sharded: Path) -> None:
    save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    refused(sharded, "holds both model.safetensors and")


def test_only_what_the_index_lists_is_read(sharded: Path) -> None:
    """The index is the word: a tensor that it leaves out (MTP layers, say) is not there."""
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["lm_head.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert "lm_head.weight" not in list_tensors(sharded)
    refused(sharded, "1 tensor missing (lm_head.weight)")


class Bomb:
    """Runs code when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.mark), os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.safetensors"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    mark = tmp_path / "exploded"
    write_public(tmp_path / "model", CHAT, {"a": torch.zeros(1)})
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Bomb(mark)))
    refused(tmp_path / "model", name)
    assert not mark.exists()
    pickle.loads((tmp_path / "model" / name).read_bytes())  # it is a real one
    assert mark.exists()


def test_unreadable_shard_is_one_sentence(sharded: Path) -> None:
    shard = sharded / "model-00001-of-00004.safetensors"
    shard.unlink()
    shard.mkdir()
    refused(sharded, "model-00001-of-00004.safetensors: ")


def test_a_shard_that_vanishes_while_reading_is_named(sharded: Path) -> None:
    tensors = read_tensors(sharded)
    next(tensors)
    (sharded / "model-00004-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00004-of-00004\.safetensors"):
        list(tensors)
