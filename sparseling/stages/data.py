"""The data stage: sources -> documents -> tokenizer -> token shards -> baselines. Each step is skipped when its result is there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..data.baseline import baseline_bits_per_byte
from ..data.documents import DocumentsSpec, prepare_documents
from ..data.own import FileSource
from ..data.own import HubDataset as HubSource
from ..data.shards import Shards, read_documents, write_shards
from ..data.tokenizer import Tokenizer, train_tokenizer
from ..errors import UserError
from ..files import read_json, write_aside, write_json
from ..progress import bar, say
from ..recipe import Pretrain, Recipe, TokenizerSettings, Worked
from ..study.tasks.corpus import worked_documents
from .context import Context
from .training import validation_end

BASELINE_TRAINING_BYTES = 20_000_000  # an order-2 byte model gains next to nothing beyond


def run(context: Context) -> dict[str, Any]:
    """Make `documents/`, `tokenizer/`, `shards/<split>/<domain>/` and `baselines.json` in the stage's folder."""
    recipe, folder = context.recipe, context.folder
    documents = folder / "documents"
    prepare_documents(documents_spec(recipe), documents, workers=recipe.threads)
    write_worked(recipe.data.worked, documents, recipe.seed)
    domains = [domain for domain in wanted_domains(recipe) if (documents / "train" / f"{domain}.jsonl").exists()]
    missing = sorted(set(wanted_domains(recipe)) - set(domains))
    if missing:
        raise UserError(f"data: the mixture uses {', '.join(missing)} but no source gives such text; add a source or take the domain out")
    tokenizer = prepare_tokenizer(recipe.data.tokenizer, documents, domains, folder / "tokenizer")
    manifests = {split: {domain: write_split(documents / split / f"{domain}.jsonl", tokenizer, folder / "shards" / split / domain)
                         for domain in domains} for split in ("train", "validation")}
    return {
        "documents": str(documents.relative_to(context.run_folder)), "vocab_size": tokenizer.vocab_size,
        "tokens": {split: {d: m["tokens"] for d, m in by_domain.items()} for split, by_domain in manifests.items()},
        "bytes": {split: {d: m["bytes"] for d, m in by_domain.items()} for split, by_domain in manifests.items()},
        "baseline_bits_per_byte": baselines(context, tokenizer, domains),
    }


def documents_spec(recipe: Recipe) -> DocumentsSpec:
    """What the recipe asks of the sources; only domains that some mixture uses are fetched."""
    wanted, domains = recipe.data.documents, wanted_domains(recipe)
    return DocumentsSpec(
        preset=None if wanted.preset == "none" else wanted.preset,
        files=tuple(FileSource(file.path, file.domain, file.licence) for file in wanted.files),
        huggingface=tuple(HubSource(**dataclasses.asdict(each)) for each in wanted.huggingface),
        validation_share=wanted.validation_share, max_bytes={d: n for d, n in wanted.max_bytes.items() if d in domains}, seed=recipe.seed,
        domains=tuple(d for d in domains if d != "worked"),
    )


def wanted_domains(recipe: Recipe) -> list[str]:
    """Every domain that some mixture of the recipe gives a weight, sorted."""
    sides = [side for stage in recipe.stages if isinstance(stage, Pretrain) for side in stage.mixture.values() if side.share]
    return sorted({domain for side in sides for domain, weight in side.domains.items() if weight})


def write_worked(worked: Worked, documents: Path, seed: int) -> None:
    """Generated worked solutions as the domain `worked`: train and validation are streams of different seeds."""
    if not worked.tasks or not worked.bytes:
        return
    amounts = {"train": worked.bytes, "validation": max(20_000, worked.bytes // 100)}
    for split, amount in amounts.items():
        path = documents / split / "worked.jsonl"
        if path.exists():
            continue
        stream_seed = 2 * seed + (split == "validation")
        with bar(f"worked solutions, {split}", amount) as line, write_aside(path) as out:
            written = 0
            for identity, text in worked_documents(worked.tasks, stream_seed, worked.steps_share):
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
    """The first documents of every domain, each domain with the same share of its text, `sample_bytes` in all."""
    files = [documents / "train" / f"{domain}.jsonl" for domain in domains]
    share = min(1.0, sample_bytes / max(1, sum(file.stat().st_size for file in files)))
    for file in files:
        yield from first_texts(file, round(share * file.stat().st_size))


def first_texts(file: Path, size_bytes: int) -> Iterator[str]:
    """The first documents of a file, about `size_bytes` of UTF-8 text."""
    for _, text in read_documents(file):
        if size_bytes <= 0:
            return
        yield text
        size_bytes -= len(text.encode())


def write_split(path: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Token shards of one file of documents; returns their manifest."""
    if not (folder / "manifest.json").exists():
        write_shards(path, tokenizer, folder)
    Shards.open(folder, tokenizer.sha256)
    manifest: dict[str, Any] = read_json(folder / "manifest.json")
    return manifest


def baselines(context: Context, tokenizer: Tokenizer, domains: list[str]) -> dict[str, dict[str, float]]:
    """Bits per byte of an order-2 byte model trained on the same text, and of compressors, on the very text that validation reads."""
    path = context.folder / "baselines.json"
    if path.exists():
        found: dict[str, dict[str, float]] = read_json(path)
        return found
    scores: dict[str, dict[str, float]] = {}
    for domain in domains:
        training = first_texts(context.folder / "documents" / "train" / f"{domain}.jsonl", BASELINE_TRAINING_BYTES)
        shards = Shards.open(context.folder / "shards" / "validation" / domain)
        validation = validation_texts(shards, tokenizer, validation_end(context.recipe, shards))
        for name, value in baseline_bits_per_byte(training, validation).items():
            scores.setdefault(name, {})[domain] = round(value, 4)
    write_json(path, scores)
    say("baselines, bits per byte: " + "; ".join(f"{n} " + ", ".join(f"{d} {v:.2f}" for d, v in by.items()) for n, by in scores.items()))
    return scores


def validation_texts(shards: Shards, tokenizer: Tokenizer, end: int) -> list[str]:
    """The documents within the first `end` tokens, the last one cut there."""
    starts = [int(start) for start in shards.document_starts if start < end]
    return [tokenizer.decode(shards.read(a, b - a).tolist()) for a, b in zip(starts, [*starts[1:], end], strict=True)]
