"""Each source on its own: fetched, read, cleaned, written to `<domain>.<source>.jsonl` with a note beside it that says it is finished."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import disk_full, hash_of, read_json, sha256_of_file, write_json
from ..progress import bar, say
from .cleaning import OWN, RULES, Rules, clean
from .document_files import write_documents
from .fetch import FetchError, fetch, opened
from .own import FileSource, HubDataset, file_name, hub_documents, own_files
from .readers import Document, walk
from .sources import Source

# Raised when readers, rules or the file format change, so that folders written by older code are made anew.
VERSION = 3
DOWNLOADS_AT_ONCE = 4
READERS_AT_ONCE = 4  # those of them that run is the pool's choice
Note = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One source to be finished in `folder`. Exactly one of `source`, `own` and `hub` is set."""

    name: str
    domain: str
    licence: str
    folder: Path
    source: Source | None = None
    own: FileSource | None = None
    hub: HubDataset | None = None

    @property
    def documents_path(self) -> Path:
        return self.folder / f"{self.domain}.{self.name}.jsonl"

    @property
    def note_path(self) -> Path:
        return self.folder / f"{self.domain}.{self.name}.json"

    @property
    def rules(self) -> Rules:
        return RULES[self.domain] if self.source else OWN


def jobs_for(sources: Iterable[Source], files: Iterable[FileSource], hub: Iterable[HubDataset], folder: Path) -> list[Job]:
    """One job a source, in that order. Raises `UserError` when two would write the same file."""
    jobs = [Job(source.name, source.domain, source.licence, folder, source=source) for source in sources]
    jobs += [Job(file.name or file_name(Path(file.path)), file.domain, file.licence, folder, own=file) for file in files]
    jobs += [Job(file_name(Path(each.name.replace("/", "-"))), each.domain, each.licence, folder, hub=each) for each in hub]
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            raise UserError(f"documents: {count} sources are called '{name}'; give each of your files a `name` of its own")
    return jobs


def collect(jobs: Sequence[Job], cache: Path, pool: Executor | None) -> tuple[dict[str, Note], dict[str, str]]:
    """Finish every job that is not finished yet: `(notes, skipped)`, by source name; `skipped` says why a package could not be had.

    Downloads run `DOWNLOADS_AT_ONCE` at a time, readers in the processes of `pool` (None: in this process). Raises `UserError` for the
    user's own files and for a full disk; what was finished by then is kept.
    """
    notes: dict[str, Note] = {}
    skipped: dict[str, str] = {}
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE + READERS_AT_ONCE) as threads, bar("sources", len(jobs)) as line:
        downloads = threading.BoundedSemaphore(DOWNLOADS_AT_ONCE)
        futures: dict[Future[tuple[Note, bool]], Job] = {threads.submit(finish, job, cache, pool, downloads): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                try:
                    note, was_finished = future.result()
                except FetchError as error:
                    skipped[job.name] = str(error)
                    say(f"warning: {job.name} is left out: {error}")
                except BrokenProcessPool:
                    raise UserError(f"{job.name}: its reader process died (no memory left?); free some or set fewer workers") from None
                else:
                    notes[job.name] = note
                    say(summary_line(note) + (" (finished before)" if was_finished else ""))
                line.advance()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    in_order = [job.name for job in jobs]  # not in the order of arrival, which differs from run to run
    return {name: notes[name] for name in in_order if name in notes}, {name: skipped[name] for name in in_order if name in skipped}


@contextlib.contextmanager
def reading_pool(workers: int) -> Iterator[Executor | None]:
    """Processes that read, started when first needed; None for one worker: then the calling process reads."""
    if workers < 2:
        yield None
        return
    # spawn: a fork of a process with threads and a loaded torch may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=follow_parent) as pool:
        yield pool


def follow_parent() -> None:
    """Leave Ctrl-C to the parent, which lets the readers end their source; end at once when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def finish(job: Job, cache: Path, pool: Executor | None, downloads: threading.BoundedSemaphore) -> tuple[Note, bool]:
    """The note of a finished job, and whether it was finished before."""
    try:
        origin = origin_of(job)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); see to its permissions") from None
    note = finished_note(job, origin)
    if note:
        return note, True
    with downloads:
        archives = fetch(job.source, cache) if job.source else []
    work = partial(read_source, job, origin, archives, cache)
    # The stream of a hub data set needs this process's network settings, and the library that reads it is heavy to load twice.
    return (pool.submit(work).result() if pool and not job.hub else work()), False


def origin_of(job: Job) -> dict[str, Any]:
    """All that the documents of a job depend on; for the user's files their content."""
    if job.source:
        reader = partial(job.source.read)
        return {"registry": job.source.registry, "packages": list(job.source.packages), "reader": [reader.func.__name__, reader.keywords]}
    if job.own:
        place = Path(job.own.path)
        files = walk(place) if place.is_dir() else [(place.name, place)]
        return {"path": job.own.path, "field": job.own.field, "files": {name: sha256_of_file(path) for name, path in files}}
    assert job.hub is not None
    return {"dataset": dataclasses.asdict(job.hub)}


def finished_note(job: Job, origin: dict[str, Any]) -> Note | None:
    """The note of an earlier run, when it is about the same origin and the documents are all there."""
    if not job.note_path.exists() or not job.documents_path.exists():
        return None
    note: Note = read_json(job.note_path)
    same = note.get("hash") == note_hash(job, origin) and note.get("file_bytes") == job.documents_path.stat().st_size
    return note if same else None


def note_hash(job: Job, origin: dict[str, Any]) -> str:
    return hash_of({"version": VERSION, "name": job.name, "domain": job.domain, "origin": origin})


def read_source(job: Job, origin: dict[str, Any], archives: Sequence[Path], cache: Path) -> Note:
    """Read, clean and write one source; then its note. Raises `FetchError` for a package that cannot be read."""
    dropped: Counter[str] = Counter()
    try:
        with contextlib.ExitStack() as stack:
            documents, size = write_documents(job.documents_path, clean(raw_documents(job, archives, cache, stack), job.rules, dropped))
    except (UserError, FetchError):
        raise
    except Exception as error:  # a broken archive fails in as many ways as there are formats
        if full := disk_full(error, job.documents_path):
            raise full from None
        if not job.source:
            raise UserError(f"{job.name}: cannot be read ({type(error).__name__}: {error}); see to the file") from error
        where = archives[0] if archives else job.name
        raise FetchError(f"{where} cannot be read ({type(error).__name__}: {error}); delete it and run the same command again") from error
    note = {
        "name": job.name, "domain": job.domain, "licence": job.licence, "documents": documents, "bytes": size, "dropped": dict(dropped),
        "archives": {path.name: sha256_of_file(path) for path in archives}, **origin,
        "file_bytes": job.documents_path.stat().st_size, "hash": note_hash(job, origin),
    }  # fmt: skip
    write_json(job.note_path, note)
    return note


def raw_documents(job: Job, archives: Sequence[Path], cache: Path, stack: contextlib.ExitStack) -> Iterator[Document]:
    if job.source:
        return job.source.read(stack.enter_context(opened(job.source.registry, archives, cache)))
    if job.own:
        return own_files(Path(job.own.path), job.domain, job.own.field)
    assert job.hub is not None
    return hub_documents(job.hub)


def summary_line(note: Note) -> str:
    lost = ", ".join(f"{count} {reason}" for reason, count in note["dropped"].items())
    line = f"{note['domain']:6} {note['name']:20} {note['documents']:8,} documents {note['bytes'] / 1e6:8.2f} MB  {note['licence']}"
    return line + (f"  (left out: {lost})" if lost else "")
