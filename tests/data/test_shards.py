"""Token shards: lossless, resumable to the byte, and every kind of damage is an error that names the file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparseling.data import shards as module
from sparseling.data.document_files import read_documents
from sparseling.data.shards import Shards, write_shards
from sparseling.data.tokenizer import Tokenizer, train_tokenizer
from sparseling.errors import UserError

from .small_corpus import HARD_TEXTS, corpus, small_tokenizer

SIZE = 3000  # tokens in a shard: a handful of shards
DOCUMENTS = [(f"doc-{number}", text) for number, text in enumerate(corpus(documents=80) + HARD_TEXTS)]
WITH_TEXT = [text for _, text in DOCUMENTS if text]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_jsonl(path: Path, documents: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"id": identity, "text": text}) + "\n" for identity, text in documents))
    return path


@pytest.mark.parametrize("size", [1, 2000, 10**9])
def test_the_stream_is_every_document_in_order_with_its_end(tmp_path: Path, tokenizer: Tokenizer, size: int) -> None:
    shards = write_shards(DOCUMENTS, tokenizer, tmp_path, size)
    expected = [[*tokenizer.encode(text), tokenizer.end_of_text_id] for text in WITH_TEXT]
    flat = np.concatenate([np.array(ids) for ids in expected])
    assert shards.documents == len(WITH_TEXT) and shards.tokens == len(flat)
    assert shards.text_bytes == sum(len(unicodedata.normalize("NFC", text).encode()) for text in WITH_TEXT)
    np.testing.assert_array_equal(shards.read(0, shards.tokens), flat)
    for number, ids in enumerate(expected):
        assert shards.document(number).tolist() == ids
    source = random.Random(1)
    for _ in range(50):
        start = source.randrange(shards.tokens)
        count = source.randrange(shards.tokens - start + 1)
        np.testing.assert_array_equal(shards.read(start, count), flat[start : start + count])
    owner = np.repeat(np.arange(len(expected)), [len(ids) for ids in expected])
    np.testing.assert_array_equal(shards.document_of(np.arange(shards.tokens)), owner)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    sizes = [shard["tokens"] for shard in manifest["shards"]]
    assert all(tokens >= size for tokens in sizes[:-1])
    last = np.cumsum([shard["documents"] for shard in manifest["shards"]])
    assert all(tokens - len(expected[end - 1]) < size for tokens, end in zip(sizes, last, strict=True))  # closed at once


def test_the_files_are_as_the_format_says(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards([("a", "hi"), ("b", "you")], tokenizer, tmp_path)
    assert sorted(contents(tmp_path)) == ["documents-00000.npy", "manifest.json", "tokens-00000.bin"]
    expected = [*tokenizer.encode("hi"), tokenizer.end_of_text_id, *tokenizer.encode("you"), tokenizer.end_of_text_id]
    assert np.fromfile(tmp_path / "tokens-00000.bin", dtype="<u2").tolist() == expected
    starts = np.load(tmp_path / "documents-00000.npy")
    assert starts.dtype == np.int64 and starts.tolist() == [0, len(tokenizer.encode("hi")) + 1]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["dtype"], manifest["bytes"], manifest["tokenizer_sha256"]) == ("uint16", 5, tokenizer.sha256)


def test_a_large_vocabulary_gives_uint32(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import dataclasses

    large = dataclasses.replace(tokenizer, vocab_size=70_000, end_of_text_id=69_999)
    shards = write_shards(DOCUMENTS[:5], large, tmp_path, 100)
    assert json.loads((tmp_path / "manifest.json").read_text())["dtype"] == "uint32"
    assert shards.document(0)[-1] == 69_999 and shards.document(0)[:-1].tolist() == tokenizer.encode(DOCUMENTS[0][1])


def test_a_jsonl_file_and_pairs_give_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(iter(DOCUMENTS), tokenizer, tmp_path / "pairs", 1000)
    write_shards(write_jsonl(tmp_path / "documents.jsonl", DOCUMENTS), tokenizer, tmp_path / "jsonl", 1000)
    assert contents(tmp_path / "pairs") == contents(tmp_path / "jsonl")


@pytest.mark.parametrize("fail_at", [1, 25, 60, 95])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, tokenizer: Tokenizer, fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHARACTERS_PER_BATCH", 500)
    write_shards(DOCUMENTS, tokenizer, tmp_path / "whole", SIZE)

    class Failing(list[tuple[str, str]]):
        def __iter__(self) -> Iterator[tuple[str, str]]:
            for number, document in enumerate(super().__iter__()):
                if number == fail_at:
                    raise KeyboardInterrupt
                yield document

    with pytest.raises(KeyboardInterrupt):
        write_shards(Failing(DOCUMENTS), tokenizer, tmp_path / "cut", SIZE)
    with pytest.raises(UserError, match="not finished"):
        Shards.open(tmp_path / "cut")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("tokens-*")}
    assert (len(kept) > 0) is (fail_at > 1)
    write_shards(DOCUMENTS, tokenizer, tmp_path / "cut", SIZE)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all((tmp_path / "cut" / name).stat().st_mtime_ns == written for name, written in kept.items())  # not done twice


def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = DOCUMENTS * 6
    jsonl = write_jsonl(tmp_path / "documents.jsonl", documents)
    write_shards(jsonl, tokenizer, tmp_path / "whole", 3000)
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom sparseling.data import shards\n"
        "from sparseling.data.tokenizer import Tokenizer\n"
        "shards._CHARACTERS_PER_BATCH = 3000\nos.fsync = lambda handle: time.sleep(0.005)\n"
        "tokenizer = Tokenizer.load(sys.argv[2])\ntokenizer.encode('warm')\nprint('go', flush=True)\n"
        "shards.write_shards(Path(sys.argv[1]), tokenizer, sys.argv[3], 3000)\n"
    )
    source, killed = random.Random(4), 0
    for _ in range(4):
        command = [sys.executable, "-c", script, str(jsonl), str(tokenizer.folder), str(tmp_path / "cut")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None and process.stdout.readline() == b"go\n"
            time.sleep(source.uniform(0.0, 0.25))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
    assert killed >= 2  # six flushes a shard, some twenty shards: it was far from its end
    write_shards(jsonl, tokenizer, tmp_path / "cut", 3000)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shards(DOCUMENTS, tokenizer, tmp_path, SIZE)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert write_shards(DOCUMENTS, tokenizer, tmp_path, SIZE).documents == len(WITH_TEXT)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", ["text", "fewer", "more", "order", "shard size", "tokenizer", "damage", "manifest"])
def test_anything_that_changed_is_written_anew(tmp_path: Path, tokenizer: Tokenizer, change: str) -> None:
    folder = tmp_path / "shards"
    write_shards(DOCUMENTS, tokenizer, folder, SIZE)
    documents, size = list(DOCUMENTS), SIZE
    if change == "text":
        documents[40] = ("doc-40", "another text")
    elif change == "fewer":
        documents = documents[:30]
    elif change == "more":
        documents += [("new", "one more")]
    elif change == "order":
        documents.reverse()
    elif change == "shard size":
        size = SIZE + 7
    elif change == "tokenizer":
        tokenizer = train_tokenizer(corpus(), 400, tmp_path / "other", "x")
    elif change == "damage":
        os.truncate(folder / "tokens-00003.bin", 10)
    elif change == "manifest":
        (folder / "manifest.json").write_text('{"shards": 3')
    write_shards(documents, tokenizer, folder, size)
    write_shards(documents, tokenizer, tmp_path / "fresh", size)
    assert contents(folder) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("victim", ["tokens-00001.bin", "documents-00001.npy"])
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, tokenizer: Tokenizer, victim: str) -> None:
    write_shards(DOCUMENTS, tokenizer, tmp_path, SIZE)
    path = tmp_path / victim
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(UserError, match=victim):
        Shards.open(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=f"{victim}.*hash"):
        Shards.open(tmp_path, verify=True)
    path.unlink()
    with pytest.raises(UserError, match=victim):
        Shards.open(tmp_path)
    path.write_bytes(whole)
    assert Shards.open(tmp_path, tokenizer.sha256, verify=True).documents == len(WITH_TEXT)


def test_a_wrong_manifest_or_tokenizer_is_a_user_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        Shards.open(tmp_path / "nowhere")
    write_shards(DOCUMENTS, tokenizer, tmp_path, SIZE)
    with pytest.raises(UserError, match="another tokenizer"):
        Shards.open(tmp_path, tokenizer_sha256="0" * 64)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for damaged in ([], {}, *({**manifest, **change} for change in ({"shards": []}, {"shards": 7}, {"dtype": "text"}, {"tokens": 3}))):
        (tmp_path / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"manifest\.json"):
            Shards.open(tmp_path)


def test_bad_input_is_a_user_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "documents.jsonl"
    for line in (b"{", b'{"id": "x"}', b'{"id": 3, "text": "y"}', b"[1]", b'{"id": "x", "text": "\xff"}'):
        path.write_bytes(b'{"id": "a", "text": "fine"}\n' + line + b"\n")
        with pytest.raises(UserError, match=r"documents\.jsonl: line 2"):
            list(read_documents(path))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no document with any text"):
        write_shards(path, tokenizer, tmp_path / "a")
    with pytest.raises(UserError, match="no document with any text"):
        write_shards([("a", "")], tokenizer, tmp_path / "b")
    with pytest.raises(UserError, match="no such file"):
        write_shards(tmp_path / "nowhere.jsonl", tokenizer, tmp_path / "c")


def test_a_lone_surrogate_in_json_does_not_stop_the_run(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"id": "a", "text": "x\\ud800y"}\n')
    for _ in range(2):  # the second time its hash is compared
        shards = write_shards(path, tokenizer, tmp_path / "shards")
        assert tokenizer.decode(shards.document(0).tolist()) == "x\ufffdy"
