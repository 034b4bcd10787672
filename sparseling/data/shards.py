"""Token shards: the documents of one domain as flat integer files that training maps into memory.

A folder holds `tokens-00000.bin` (little-endian uint16, or uint32 for a vocabulary above 65,536), `documents-00000.npy`
(int64, where each document starts in its tokens file) and so on, and `manifest.json` with counts and hashes. Each document ends
with `<|endoftext|>`. While a folder is being written its state is in `partial.json`; only a finished folder has a manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..files import read_json, sha256_of_file, write_aside, write_json
from ..progress import Bar, bar, say, track
from .document_files import read_documents
from .readers import Document
from .tokenizer import Tokenizer

DEFAULT_TOKENS_PER_SHARD = 2**25  # 64 MB of uint16; a shard being written is held in memory with its text
_CHARACTERS_PER_BATCH = 4_000_000  # encoded at once: enough to keep all cores busy, little memory


@dataclass(frozen=True, eq=False)
class Shards:
    """One domain's tokens as a single stream over all its files, opened with `Shards.open`.

    `tokens` and `documents` are counts; `text_bytes` is the UTF-8 text (in NFC, without the document ends);
    `document_starts` [documents] int64 are positions in the stream.
    """

    folder: Path
    tokens: int
    documents: int
    text_bytes: int
    tokenizer_sha256: str
    document_starts: np.ndarray = field(repr=False)
    _files: list[np.ndarray] = field(repr=False)
    _file_starts: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, folder: str | Path, tokenizer_sha256: str | None = None, verify: bool = False) -> Shards:
        """Map a finished folder into memory. `verify` hashes every file as well.

        Raises `UserError` that names the file when one is missing, cut, altered, or made with another tokenizer than
        `tokenizer_sha256`.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        if not path.exists() and (folder / "partial.json").exists():
            raise UserError(f"{folder}: its token shards are not finished; run the same command again, what was finished is kept")
        manifest = read_json(path)
        try:
            if tokenizer_sha256 is not None and manifest["tokenizer_sha256"] != tokenizer_sha256:
                raise UserError(f"{path}: made with another tokenizer; tokenize the documents again or use that tokenizer")
            dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
            for shard in manifest["shards"]:
                _check_files(folder, shard, dtype, verify)
            names = [list(shard["files"]) for shard in manifest["shards"]]
            files: list[np.ndarray] = [np.memmap(folder / tokens_name, dtype=dtype, mode="r") for tokens_name, _ in names]
            lengths = [shard["tokens"] for shard in manifest["shards"]]
            file_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            starts = np.concatenate([np.load(folder / name) + file_starts[n] for n, (_, name) in enumerate(names)])
            tokens, documents, text_bytes = manifest["tokens"], manifest["documents"], manifest["bytes"]
            shards = cls(folder, tokens, documents, text_bytes, manifest["tokenizer_sha256"], starts, files, file_starts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest of token shards ({error!r}); tokenize the documents again") from None
        if shards.tokens != file_starts[-1] or shards.documents != len(starts):
            raise UserError(f"{path}: its counts contradict each other; tokenize the documents again")
        return shards

    def read(self, start: int, count: int) -> np.ndarray:
        """[count] int64: tokens `start` to `start + count` of the stream, across files."""
        assert start >= 0 and start + count <= self.tokens, (start, count, self.tokens)
        pieces, file = [], int(np.searchsorted(self._file_starts, start, side="right")) - 1
        while count > 0:
            offset = start - int(self._file_starts[file])
            piece = self._files[file][offset : offset + count]
            pieces.append(piece.astype(np.int64))
            start, count, file = start + len(piece), count - len(piece), file + 1
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def document(self, number: int) -> np.ndarray:
        """[tokens] int64: one document with its `<|endoftext|>`."""
        start = int(self.document_starts[number])
        end = int(self.document_starts[number + 1]) if number + 1 < self.documents else self.tokens
        return self.read(start, end - start)

    def document_of(self, positions: np.ndarray) -> np.ndarray:
        """int64: the number of the document in which each position of the stream lies."""
        return np.searchsorted(self.document_starts, positions, side="right") - 1


def write_shards(
    documents: str | Path | Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    tokens_per_shard: int = DEFAULT_TOKENS_PER_SHARD,
) -> Shards:
    """Tokenize `documents` (a JSON-lines file of `id` and `text`, or pairs) into `folder` and open the result.

    Resumable: after an interruption the same call keeps the finished shards of the same documents and goes on; the files are
    byte for byte those of an undisturbed run. A finished folder of the same documents is left as it is. (Documents that can
    be iterated only once begin anew.) A shard is closed as soon as it holds `tokens_per_shard` or more; a document is never split.
    Raises `UserError` for unreadable lines, no text at all, a full disk.
    """
    folder = Path(folder)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    settings = {
        "format": 1,
        "dtype": dtype.name,
        "tokenizer_sha256": tokenizer.sha256,
        "end_of_text_id": tokenizer.end_of_text_id,
        "tokens_per_shard": tokens_per_shard,
    }
    total = Path(documents).stat().st_size / 1e6 if isinstance(documents, str | Path) and Path(documents).exists() else None
    finished, complete = _finished_shards(documents, folder, settings)
    if complete and (folder / "manifest.json").exists():
        _remove_strays(folder, finished)
        return Shards.open(folder, tokenizer.sha256)
    if tokenizer.fast_encoding is None:
        say(f"{tokenizer.folder}: tokenizing takes some three times longer, this vocabulary is not exact on the fast path")
    folder.mkdir(parents=True, exist_ok=True)
    _write_state(folder, "partial.json", settings, finished)
    (folder / "manifest.json").unlink(missing_ok=True)
    with bar(f"tokenizing {folder.name} (MB)", total) as line:
        stream = _nonempty(documents)
        for _ in range(sum(shard["documents"] for shard in finished)):
            line.advance(len(next(stream)[1]) / 1e6)
        for group in _groups(_encoded(stream, tokenizer, dtype, line), tokens_per_shard):
            finished.append(_write_shard(folder, len(finished), group, tokenizer))
            _write_state(folder, "partial.json", settings, finished)
    if not finished:
        raise UserError(f"{documents if isinstance(documents, str | Path) else folder}: no document with any text; nothing to tokenize")
    _write_state(folder, "manifest.json", settings, finished)
    _remove_strays(folder, finished)
    return Shards.open(folder, tokenizer.sha256)


def _nonempty(documents: str | Path | Iterable[Document]) -> Iterator[Document]:
    source = read_documents(documents) if isinstance(documents, str | Path) else documents
    return ((identity, text) for identity, text in source if text)


def _finished_shards(
    documents: str | Path | Iterable[Document], folder: Path, settings: dict[str, Any]
) -> tuple[list[dict[str, Any]], bool]:
    """The shards of an earlier run that are whole and hold just these documents, and whether they hold all of them."""
    names = [name for name in ("manifest.json", "partial.json") if (folder / name).exists()]
    if not names or (not isinstance(documents, str | Path) and iter(documents) is documents):
        return [], False
    with contextlib.suppress(UserError, KeyError, TypeError, AttributeError):  # a damaged earlier run is written anew
        earlier = read_json(folder / names[0])
        if any(earlier[key] != value for key, value in settings.items()):
            return [], False
        good: list[dict[str, Any]] = []
        stream = _nonempty(documents)
        for shard in track(earlier["shards"], f"checking {folder.name} (shards)", len(earlier["shards"])):
            with contextlib.suppress(UserError):
                _check_files(folder, shard, np.dtype(settings["dtype"]), verify=True)
                digest = hashlib.sha256()
                count = sum(_add(digest, document) for document in itertools.islice(stream, shard["documents"]))
                if (count, digest.hexdigest()) == (shard["documents"], shard["source_sha256"]):
                    good.append(shard)
                    continue
            return good, False
        if next(stream, None) is None:
            return good, True
        # More documents than before: the last shard may have ended only because they had.
        return [shard for shard in good if shard["tokens"] >= settings["tokens_per_shard"]], False
    return [], False


def _add(digest: Any, document: Document) -> int:
    """Feed one document to a digest; returns 1, the documents fed."""
    for part in document:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return 1


@dataclass(frozen=True)
class _Encoded:
    document: Document
    tokens: np.ndarray


def _encoded(documents: Iterator[Document], tokenizer: Tokenizer, dtype: np.dtype, line: Bar) -> Iterator[_Encoded]:
    """Each document with its tokens and `<|endoftext|>`; encoded in batches on all cores."""
    for batch in _batches(documents):
        for document, ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            yield _Encoded(document, np.array([*ids, tokenizer.end_of_text_id], dtype=dtype))
            line.advance(len(document[1]) / 1e6)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= _CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _groups(encoded: Iterator[_Encoded], tokens_per_shard: int) -> Iterator[list[_Encoded]]:
    """The documents of each shard. Where it ends depends on its own documents alone: so a resumed run cuts at the same places."""
    group: list[_Encoded] = []
    count = 0
    for item in encoded:
        group.append(item)
        count += len(item.tokens)
        if count >= tokens_per_shard:
            yield group
            group, count = [], 0
    if group:
        yield group


def _write_shard(folder: Path, number: int, group: list[_Encoded], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write one shard's two files; returns its entry in the manifest."""
    tokens = np.concatenate([item.tokens for item in group])
    starts = np.cumsum([0] + [len(item.tokens) for item in group[:-1]], dtype=np.int64)
    tokens_name, starts_name = f"tokens-{number:05}.bin", f"documents-{number:05}.npy"
    with write_aside(folder / tokens_name, "wb") as stream:
        stream.write(tokens.tobytes())
    with write_aside(folder / starts_name, "wb") as stream:
        np.save(stream, starts)
    digest = hashlib.sha256()
    return {
        "tokens": len(tokens),
        "documents": sum(_add(digest, item.document) for item in group),
        "bytes": int(tokenizer.text_bytes_per_id[tokens].sum()),
        "source_sha256": digest.hexdigest(),
        "files": {name: sha256_of_file(folder / name) for name in (tokens_name, starts_name)},
    }


def _write_state(folder: Path, name: str, settings: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}
    write_json(folder / name, {**settings, **totals, "shards": shards})


def _remove_strays(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Remove what is left of earlier runs: their state, higher shards, files that were being written when they died."""
    names = {"manifest.json"}.union(*(shard["files"] for shard in shards))
    for pattern in ("partial.json", "tokens-*.bin", "documents-*.npy", ".*.tmp"):
        for path in folder.glob(pattern):
            if path.name not in names:
                path.unlink()


def _check_files(folder: Path, shard: dict[str, Any], dtype: np.dtype, verify: bool) -> None:
    """Raise `UserError` unless the shard's files are there with the right length (and, to `verify`, the right hash)."""
    tokens_name, starts_name = shard["files"]
    mend = "restore it or tokenize the documents again"
    for name, sha256 in shard["files"].items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; {mend}")
        if verify and sha256_of_file(folder / name) != sha256:
            raise UserError(f"{folder / name}: its content is not what was written (hash differs); {mend}")
    size, expected = (folder / tokens_name).stat().st_size, shard["tokens"] * dtype.itemsize
    if size != expected:
        raise UserError(f"{folder / tokens_name}: holds {size} bytes, not {expected}; {mend}")
    try:
        starts = np.load(folder / starts_name, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{folder / starts_name}: not a readable list of document starts ({error}); {mend}") from None
    if starts.shape != (shard["documents"],) or starts.dtype != np.int64:
        raise UserError(f"{folder / starts_name}: holds {starts.shape} {starts.dtype}, not ({shard['documents']},) int64; {mend}")
