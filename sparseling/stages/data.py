"""The data stage: sources -> documents -> tokenizer -> token shards -> baselines. Each step is skipped when its result is there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.baseline import baseline_bits_per_byte
from ..data.batches import validation_pieces
from ..data.document_files import read_documents
from ..data.documents import DocumentsSpec, prepare_documents
from ..data.own import FileSource
from ..data.own import HubDataset as HubSource
from ..data.shards import Shards, write_shards
from ..data.sources import DOMAINS
from ..data.split import SPLITS
from ..data.tokenizer import Tokenizer, train_tokenizer
from ..errors import UserError
from ..files import read_json, write_aside, write_json
from ..progress import bar, say
from ..recipe import Eval, HubDataset, Pretrain, Recipe, TokenizerSettings, Worked
from ..study.tasks.corpus import worked_documents
from ..study.tasks.families import evaluation_problems, training_problem, validation_problem
from .context import Context
from .training import validation_windows

BASELINE_TRAINING_BYTES = 20_000_000  # an order-2 byte model gains next to nothing beyond


def run(context: Context) -> dict[str, Any]:
    """Make `documents/`, `tokenizer/`, `shards/<split>/<domain>/` and `baselines.json` in the stage's folder."""
    recipe, folder = context.recipe, context.folder
    documents = folder / "documents"
    spec = documents_spec(recipe)
    if spec.domains:
        manifest = prepare_documents(spec, documents, prompts=evaluation_prompts(recipe), workers=recipe.threads)
        drop_stale(folder, manifest["hash"])
    write_worked(recipe.data.worked, documents, recipe.seed)
    domains = [domain for domain in wanted_domains(recipe) if file_bytes(documents / "train" / f"{domain}.jsonl")]
    missing = sorted(set(wanted_domains(recipe)) - set(domains))
    if missing:
        raise UserError(f"data: the mixture uses {', '.join(missing)} but no source gave such text; add a source or take the domain out")
    tokenizer = prepare_tokenizer(recipe.data.tokenizer, documents, domains, folder / "tokenizer")
    manifests = {split: write_splits(documents / split, domains, tokenizer, folder / "shards" / split) for split in SPLITS}
    return {
        "documents": str(documents.relative_to(context.run_folder)), "vocab_size": tokenizer.vocab_size,
        "tokens": {split: {d: m["tokens"] for d, m in by_domain.items()} for split, by_domain in manifests.items()},
        "bytes": {split: {d: m["bytes"] for d, m in by_domain.items()} for split, by_domain in manifests.items()},
        "baseline_bits_per_byte": baselines(context, tokenizer, domains),
    }


def file_bytes(path: Path) -> int:
    """The size of a file, 0 when it is not there."""
    return path.stat().st_size if path.exists() else 0


def documents_spec(recipe: Recipe) -> DocumentsSpec:
    """What the recipe asks of the sources; only domains that some mixture uses are fetched."""
    wanted, domains = recipe.data.documents, wanted_domains(recipe)
    return DocumentsSpec(
        preset=None if wanted.preset == "none" else wanted.preset,
        files=tuple(FileSource(**dataclasses.asdict(file)) for file in wanted.files),
        huggingface=tuple(hub_source(each, wanted.max_bytes) for each in wanted.huggingface),
        validation_share=wanted.validation_share, seed=recipe.seed,
        max_bytes={name: limit for name, limit in wanted.max_bytes.items() if name not in DOMAINS or name in domains},
        domains=tuple(d for d in domains if d != "worked"),
    )


def hub_source(wanted: HubDataset, limits: dict[str, int]) -> HubSource:
    """A data set as the sources know it. Without a limit of its own it takes that of its domain: a stream has no end worth waiting for."""
    limit = wanted.max_bytes if wanted.max_bytes is not None else limits.get(wanted.domain)
    return HubSource(**dataclasses.asdict(wanted) | {"max_bytes": limit})


def evaluation_prompts(recipe: Recipe) -> list[str]:
    """Every prompt that an eval stage of the recipe will ask: no training text may hold one."""
    stages = [stage for stage in recipe.stages if isinstance(stage, Eval)]
    return sorted({problem.prompt for stage in stages for task in stage.tasks
                   for problem in evaluation_problems(task, stage.problems, recipe.seed)})


def drop_stale(folder: Path, documents_hash: str) -> None:
    """Remove what an earlier run made from other documents (a package was missing then, or a file of the user's has changed)."""
    path = folder / "inputs.json"
    if path.exists() and read_json(path)["documents"] != documents_hash:
        say(f"{folder}: the documents have changed; making tokenizer and shards again")
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        shutil.rmtree(folder / "shards", ignore_errors=True)
        (folder / "baselines.json").unlink(missing_ok=True)
    write_json(path, {"documents": documents_hash})


def wanted_domains(recipe: Recipe) -> list[str]:
    """Every domain that some mixture of the recipe gives a weight, sorted."""
    sides = [side for stage in recipe.stages if isinstance(stage, Pretrain) for side in stage.mixture.values() if side.share]
    return sorted({domain for side in sides for domain, weight in side.domains.items() if weight})


def write_worked(worked: Worked, documents: Path, seed: int) -> None:
    """Generated worked solutions as the domain `worked`; no problem of the validation text is in any training text."""
    if not worked.tasks or not worked.bytes:
        return
    amounts = {"train": worked.bytes, "validation": max(20_000, worked.bytes // 100)}
    for split, amount in amounts.items():
        path = documents / split / "worked.jsonl"
        if path.exists():
            continue
        problem = training_problem if split == "train" else validation_problem
        with bar(f"worked solutions, {split}", amount) as line, write_aside(path) as out:
            written = 0
            for identity, text in worked_documents(worked.tasks, seed, worked.steps_share, problem):
                out.write(json.dumps({"id": identity, "text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode())
                line.advance(len(text.encode()))
                if written >= amount:
                    break


def prepare_tokenizer(settings: TokenizerSettings, documents: Path, domains: list[str], folder: Path) -> Tokenizer:
    """The recipe's own tokenizer, copied, or one trained on a sample of all domains."""
    if not (folder / "tokenizer.json").exists():
        if settings.folder is not None:
            Tokenizer.load(settings.folder)  # a wrong folder is an error before anything is copied
            copy_tokenizer(Path(settings.folder), folder)
        else:
            train_tokenizer(sample_texts(documents, domains, settings.sample_bytes), settings.vocab_size, folder)
    return Tokenizer.load(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files; tokenizer.json last, as its presence means "done"."""
    for name in ("special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        if (source / name).exists():
            with write_aside(folder / name, "wb") as out:
                out.write((source / name).read_bytes())


def sample_texts(documents: Path, domains: list[str], sample_bytes: int) -> Iterator[str]:
    """Documents spread evenly over every domain's text, each domain with the same share of it, about `sample_bytes` in all."""
    files = [documents / "train" / f"{domain}.jsonl" for domain in domains]
    share = min(1.0, sample_bytes / max(1, sum(file.stat().st_size for file in files)))
    for file in files:
        yield from spread_texts(file, share)


def spread_texts(file: Path, share: float) -> Iterator[str]:
    """Every n-th document of a file, `share` of them all: a file stands in the order of its sources, so its beginning is no sample."""
    for number, (_, text) in enumerate(read_documents(file)):
        if int((number + 1) * share) > int(number * share):
            yield text


def write_splits(documents: Path, domains: list[str], tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, Any]]:
    """Token shards of one split, by domain; returns their manifests. A domain may have no validation text, and is then not validated."""
    manifests: dict[str, dict[str, Any]] = {}
    for domain in domains:
        path = documents / f"{domain}.jsonl"
        if documents.name == "validation" and not file_bytes(path):
            say(f"warning: {domain} has no validation text; to have it measured raise data.documents.validation_share or add documents")
            continue
        write_shards(path, tokenizer, folder / domain)
        manifests[domain] = read_json(folder / domain / "manifest.json")
    return manifests


def baselines(context: Context, tokenizer: Tokenizer, domains: list[str]) -> dict[str, dict[str, float]]:
    """Bits per byte of an order-2 byte model trained on the same text, and of compressors, on the very text that validation reads."""
    path = context.folder / "baselines.json"
    if path.exists():
        found: dict[str, dict[str, float]] = read_json(path)
        return found
    scores: dict[str, dict[str, float]] = {}
    for domain in domains:
        if not (context.folder / "shards" / "validation" / domain).exists():
            continue
        file = context.folder / "documents" / "train" / f"{domain}.jsonl"
        training = spread_texts(file, min(1.0, BASELINE_TRAINING_BYTES / file.stat().st_size))
        shards = Shards.open(context.folder / "shards" / "validation" / domain)
        pieces = [piece.tolist() for piece in validation_pieces(shards, *validation_windows(context.recipe))]
        validation, ended = [tokenizer.decode(piece) for piece in pieces], [piece[-1] == tokenizer.end_of_text_id for piece in pieces]
        for name, value in baseline_bits_per_byte(training, validation, ended).items():
            scores.setdefault(name, {})[domain] = round(value, 4)
    write_json(path, scores)
    say("baselines, bits per byte: " + "; ".join(f"{n} " + ", ".join(f"{d} {v:.2f}" for d, v in by.items()) for n, by in scores.items()))
    return scores
