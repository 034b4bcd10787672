"""Readers of what packages ship: plain text, source code, wheels, folders, tar archives.

A reader takes a place (an unpacked package, a wheel, a folder) and yields documents `(id, text)` as they stand in the
files. It does not judge: what is worth keeping is decided once, in `cleaning`.
"""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

Document = tuple[str, str]
Reader = Callable[[Path], Iterator[Document]]

NOTHING = r"(?!)"
ZIP_SUFFIXES = (".whl", ".zip", ".jar")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
# A larger file is data, not text that somebody wrote; it also bounds what a zip bomb can do.
MAX_FILE_BYTES = 256 << 20
MAX_CODE_FILE_BYTES = 1_000_000
CODE = (
    r"\.(py|pyx|c|h|cc|cpp|hpp|cxx|cu|go|rs|java|js|mjs|ts|tsx|rb|pl|pm|sh|lua|scala|kt|swift|hs|ml|mli|jl|r|R|sql|cmake|el|lisp|scm|erl|ex|php|cs"
    r"|f90|f|m|S|dts|dtsi|proto|css|v|agda)$"
)
NOT_DOCUMENTS = r"(^|/)(copyright|changelog|NEWS|LICEN)"
NOT_WRITTEN_HERE = r"(^|/)(vendor|third_party|node_modules|_vendor|testdata|locale|tests?/data)/|_pb2|\.min\."


def decode(raw: bytes) -> str:
    """UTF-8, else Latin-1 (which reads any bytes); NULs and a byte-order mark are dropped."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return text.replace("\x00", "").removeprefix("\ufeff")


def members(place: Path, pattern: str, skip: str = NOTHING, max_bytes: int = MAX_FILE_BYTES) -> Iterator[tuple[str, bytes]]:
    """The files of a folder, zip or tar archive whose relative path matches `pattern` and not `skip`, as `(path, bytes)`.

    Sorted by path, except in a tar archive, which is read in one pass. A `.gz` or `.dz` file is decompressed. Links and files over
    `max_bytes` are left out. A broken archive raises what its library raises (`zipfile.BadZipFile`, `tarfile.TarError`, `OSError`, ...).
    """
    wanted, unwanted = re.compile(pattern), re.compile(skip)

    def chosen(name: str, size: int) -> bool:
        return size <= max_bytes and bool(wanted.search(name)) and not unwanted.search(name)

    if place.is_dir():
        for name, path in walk(place):
            if chosen(name, path.stat().st_size):
                yield name, decompressed(name, path.read_bytes())
    elif place.name.endswith(ZIP_SUFFIXES):
        with zipfile.ZipFile(place) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.filename):
                if not info.is_dir() and chosen(info.filename, info.file_size):
                    yield info.filename, decompressed(info.filename, archive.read(info))
    elif place.name.endswith(TAR_SUFFIXES):
        with tarfile.open(place) as tar:
            for entry in tar:
                stream = tar.extractfile(entry) if entry.isfile() and chosen(entry.name, entry.size) else None
                if stream is not None:
                    yield entry.name, decompressed(entry.name, stream.read())
    else:
        raise ValueError(f"{place}: neither a folder nor an archive")


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """All plain files below `folder`, links left out, as `(path relative to folder with '/', path)`, in sorted order.

    Raises `OSError` for a folder that cannot be read: what is missing must not go unnoticed.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders.sort()
        for file in sorted(files):
            path = Path(parent, file)
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix(), path


def decompressed(name: str, raw: bytes) -> bytes:
    """The bytes of a gzip file (dictd's `.dz` is one too), any other file's bytes as they are."""
    return gzip.decompress(raw) if name.endswith((".gz", ".dz")) else raw


def text_files(place: Path, pattern: str = r"\.(txt|md|rst|texi)(\.gz)?$", skip: str = NOT_DOCUMENTS) -> Iterator[Document]:
    """Each matching file as one document, as it is."""
    for name, raw in members(place, pattern, skip):
        yield name, decode(raw)


def code_files(place: Path, pattern: str = CODE, skip: str = NOT_WRITTEN_HERE, inside: str = "") -> Iterator[Document]:
    """Each matching source file as one document.

    With `inside`, the files are looked for in the archives below `place` whose path matches it: a package may hold an archive of sources.
    """
    places = [path for name, path in walk(place) if re.search(inside, name)] if inside else [place]
    for each in places:
        for name, raw in members(each, pattern, skip, MAX_CODE_FILE_BYTES):
            yield name, decode(raw)
