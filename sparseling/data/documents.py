"""From a recipe's list of sources to clean, deduplicated, split documents: the first step of a run.

`prepare_documents` writes into one folder: `<domain>.<source>.jsonl` (each source cleaned, with a note beside it), `train/<domain>.jsonl`,
`validation/<domain>.jsonl` (lines `{"id", "text"}`) and `manifest.json` (where all came from, its licence, what was left out and why).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..files import hash_of, read_json, write_json
from ..progress import bar, say
from .collect import VERSION, Job, Note, collect, jobs_for, reading_pool
from .fetch import cache_folder, debian_obstacle
from .own import FileSource, HubDataset
from .sources import DOMAINS, Source, select
from .split import SPLITS, Split, split_domain

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class DocumentsSpec:
    """Which text a run is made of.

    `preset`: packages of the table in `sources` (`small`, `base`, `full`), or None for none. `files`, `huggingface`: the user's own.
    `validation_share`: share of the documents held out, by hash. `max_bytes`: most bytes of text of a domain (`prose`) or source (`sotu`),
    chosen by hash; several limits hold together. `max_document_bytes`: longer documents are cut at paragraph ends (None: never).
    `domains`: packages of the preset for other domains are not fetched.
    """

    preset: str | None = "small"
    files: tuple[FileSource, ...] = ()
    huggingface: tuple[HubDataset, ...] = ()
    validation_share: float = 0.01
    max_bytes: dict[str, int] = field(default_factory=dict)
    max_document_bytes: int | None = 32_000
    seed: int = 0
    domains: tuple[str, ...] = DOMAINS


def prepare_documents(
    spec: DocumentsSpec, folder: Path, *, prompts: Sequence[str] = (), cache: Path | None = None, workers: int = 2
) -> dict[str, Any]:
    """Make the documents of `spec` in `folder` and return the manifest. What is finished from an earlier call is kept.

    `prompts`: evaluation prompts; documents that overlap with one (13 words in a row) are left out. `cache`: where downloads are kept
    (default `cache_folder()`). `workers`: processes that read; with over one, the calling program needs `if __name__ == "__main__"`.

    Raises `UserError` when the spec is wrong, a file of the user's cannot be read, the disk is full, or nothing is left to train on (for
    the preset `small`: no prose). A package that cannot be had is left out with a warning and is asked for again by the next call.
    """
    folder = Path(folder)
    cache = cache or cache_folder()
    jobs = checked_jobs(spec, folder)
    wanted = hash_of({"version": VERSION, "spec": dataclasses.asdict(spec), "prompts": sorted(prompts)})
    sources, absent = without_debian([job.source for job in jobs if job.source])
    jobs = [job for job in jobs if job.source is None or job.source in sources]
    with reading_pool(workers) as pool:
        notes, skipped = collect(jobs, cache, pool)
        skipped = absent | skipped
        check_enough(spec, notes, skipped)
        inputs = hash_of({"wanted": wanted, "notes": {name: [note["hash"], note["file_bytes"]] for name, note in notes.items()}})
        manifest = finished_manifest(folder, inputs)
        if manifest:
            say(f"{folder}: the documents are all there already")
            return manifest
        domains = split_all(jobs, notes, folder, spec, prompts, pool)
    manifest = {"hash": inputs, "spec": dataclasses.asdict(spec), "sources": notes, "skipped": skipped, "domains": domains}
    write_json(folder / MANIFEST, manifest)
    for domain, counts in domains.items():
        say(domain_line(domain, counts))
    return manifest


def checked_jobs(spec: DocumentsSpec, folder: Path) -> list[Job]:
    """One job a source of the spec. Raises `UserError` before anything is fetched when the spec asks for what cannot be."""
    if not 0 <= spec.validation_share < 1:
        raise UserError(f"validation_share: {spec.validation_share} is not a share; write a number from 0 up to, but not, 1 (such as 0.01)")
    if spec.max_document_bytes is not None and spec.max_document_bytes < 1_000:
        raise UserError(f"max_document_bytes: {spec.max_document_bytes} is too few for a text; write 1000 or more, or null for no limit")
    for domain in (*(file.domain for file in spec.files), *(each.domain for each in spec.huggingface)):
        if domain not in DOMAINS:
            raise UserError(f"domain: there is no '{domain}'; {nearest(domain, DOMAINS)}")
    for file in spec.files:
        if not Path(file.path).exists():
            raise UserError(f"{file.path}: no such file or folder; correct the path in the recipe")
    packaged = [source for source in select(spec.preset) if source.domain in spec.domains] if spec.preset else []
    jobs = jobs_for(packaged, spec.files, spec.huggingface, folder)
    if not jobs:
        raise UserError("documents: no sources; name a preset (small, base or full), files or huggingface data sets")
    known = {*DOMAINS, *(job.name for job in jobs)}
    for name, limit in spec.max_bytes.items():
        if name not in known:
            raise UserError(f"max_bytes: there is no domain or source '{name}'; {nearest(name, known)}")
        if limit <= 0:
            raise UserError(f"max_bytes: {name}: {limit} bytes leave nothing; write a positive number")
    return jobs


def without_debian(sources: Sequence[Source]) -> tuple[list[Source], dict[str, str]]:
    """The sources that this machine can fetch, and why it cannot fetch the others."""
    wanted = [source for source in sources if source.registry == "debian"]
    obstacle = debian_obstacle() if wanted else ""
    if not obstacle:
        return list(sources), {}
    say(f"{len(wanted)} sources of Debian's are left out: {obstacle}")
    return [source for source in sources if source not in wanted], {source.name: obstacle for source in wanted}


def check_enough(spec: DocumentsSpec, notes: Mapping[str, Note], skipped: Mapping[str, str]) -> None:
    """Raise `UserError` when there is nothing to train on, or for the preset `small` no prose."""
    filled = {note["domain"] for note in notes.values() if note["documents"]}
    why = f" ({next(iter(skipped.values()))})" if skipped else ""
    if not filled:
        raise UserError(f"documents: none of the sources holds any text{why}; check the files and the network")
    if spec.preset == "small" and "prose" not in filled:
        raise UserError(f"documents: no prose could be fetched{why}; check the network and run the same command again, what came is kept")
    for note in notes.values():
        if not note["documents"]:
            say(f"warning: {note['name']} holds no text")


def finished_manifest(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The manifest of an earlier run on the same inputs, when its files are all there."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest: dict[str, Any] = read_json(path)
    if manifest.get("hash") != inputs:
        return None
    for domain, counts in manifest["domains"].items():
        for split in SPLITS:
            file = folder / split / f"{domain}.jsonl"
            if not file.exists() or file.stat().st_size != counts[split]["file_bytes"]:
                return None
    return manifest


def split_all(
    jobs: Sequence[Job], notes: Mapping[str, Note], folder: Path, spec: DocumentsSpec, prompts: Sequence[str], pool: Executor | None
) -> dict[str, Any]:
    """Split every domain, several at a time; counts by domain. Files of a domain that is no longer asked for are removed."""
    parts: dict[str, dict[str, Path]] = {}
    for job in jobs:
        if job.name in notes:
            parts.setdefault(job.domain, {})[job.name] = job.documents_path
    limits = dict(spec.max_bytes)
    for job in jobs:
        if job.own and job.own.max_bytes is not None:
            limits[job.name] = min(job.own.max_bytes, limits.get(job.name, job.own.max_bytes))
    how = Split(spec.validation_share, limits, spec.max_document_bytes, spec.seed, tuple(prompts))
    for domain in set(DOMAINS) - set(parts):
        for split in SPLITS:
            (folder / split / f"{domain}.jsonl").unlink(missing_ok=True)
    counts: dict[str, Any] = {}
    with bar("domains", len(parts)) as line:
        # The largest first, so that the last one to end is not a large one that began late.
        order = sorted(parts, key=lambda domain: -sum(path.stat().st_size for path in parts[domain].values()))
        running = {domain: pool.submit(split_domain, domain, parts[domain], folder, how) for domain in order} if pool else {}
        for domain in order:
            counts[domain] = running[domain].result() if pool else split_domain(domain, parts[domain], folder, how)
            line.advance()
    return {domain: counts[domain] for domain in DOMAINS if domain in counts}


def domain_line(domain: str, counts: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{split} {counts[split]['documents']:,} documents {counts[split]['bytes'] / 1e6:.2f} MB" for split in SPLITS)
    lost = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items())
    return f"{domain:6} {sizes}" + (f"  (left out: {lost})" if lost else "")
