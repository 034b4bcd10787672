"""A run folder -> one `Run`: what its files say, in the order of its stages. Files that are missing or broken become notes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .metrics import StageMetrics, figure, read_metrics
from .summary import Summary, folder_name, gathered, mapping, plain, sequence, summary_from


@dataclass(frozen=True)
class Stage:
    """One stage of the run: what its done.json (or, before that, stage.json) says, and what it logged if it trains."""

    name: str
    kind: str
    begun: bool
    finished: bool
    seconds: float
    hash: str
    outputs: Mapping[str, Any]
    metrics: StageMetrics | None


@dataclass(frozen=True)
class DataSource:
    """Where text came from. `origin` names its archives, packages, path or data set; `bytes` is UTF-8 text kept."""

    name: str
    domain: str
    origin: str
    licence: str
    documents: float
    bytes: float
    dropped: str


@dataclass(frozen=True)
class Run:
    """All that a report shows. `notes` say which files could not be used; `layer_names` name the rows of routing figures.

    `skipped_sources` are the sources of text that could not be had, with the reason.
    """

    name: str
    stages: tuple[Stage, ...]
    summary: Summary
    recipe: str
    sources: tuple[DataSource, ...]
    skipped_sources: Mapping[str, str]
    layer_names: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def trained(self) -> tuple[Stage, ...]:
        """The stages that logged training steps, in order."""
        return tuple(stage for stage in self.stages if stage.metrics is not None and len(stage.metrics.steps))


def collect(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder; give the folder that `sparseling run` wrote, such as runs/laptop")
    notes: list[str] = []
    raw = dict(mapping(_json(folder / "summary.json", notes)))
    recipe = _text(folder / "recipe.yaml", notes)
    kinds = _recipe_stages(recipe, notes)
    found = sorted({path.parent.name for name in ("stage.json", "done.json", "metrics.jsonl") for path in folder.glob(f"*/{name}")})
    # What the recipe does not list (the data stage is implied) comes before what it lists; a summary knows the whole order.
    names = dict.fromkeys([*summary_from(raw).stages, *(name for name in found if name not in kinds), *kinds])
    stages = tuple(_stage(folder / name, kinds.get(name, ""), notes) for name in names)
    known = gathered([(stage.name, stage.outputs) for stage in stages]) | {"machine": _json(folder / "machine.json", notes)}
    summary = summary_from(known | raw)
    sources, skipped = _sources(folder, notes)
    return Run(folder.resolve().name, stages, summary, recipe, sources, skipped, _layer_names(folder, stages, notes), tuple(notes))


def _stage(folder: Path, kind: str, notes: list[str]) -> Stage:
    begun, done = (mapping(_json(folder / name, notes)) for name in ("stage.json", "done.json"))
    known = {**begun, **done}
    path, metrics = folder / "metrics.jsonl", None
    if path.is_file():
        try:
            metrics = read_metrics(path)
        except OSError as error:
            notes.append(f"{folder.name}/metrics.jsonl could not be read: {error.strerror or error}.")
    if metrics and metrics.broken_lines:
        lines = "one unreadable line was" if metrics.broken_lines == 1 else f"{metrics.broken_lines:,} unreadable lines were"
        notes.append(f"{folder.name}/metrics.jsonl: {lines} left out (a killed run leaves one).")
    return Stage(
        folder.name, plain(known.get("kind", kind)), bool(known or metrics), bool(done), figure(known.get("seconds")),
        plain(known.get("hash", "")), mapping(done.get("outputs")), metrics,
    )


def _json(path: Path, notes: list[str]) -> Any:
    """Parsed JSON; None where the file is missing, None and a note where it is broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{_short(path)} could not be read: {error}.")
        return None


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        notes.append(f"{_short(path)} could not be read: {error.strerror or error}.")
        return ""


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _recipe_stages(recipe: str, notes: list[str]) -> dict[str, str]:
    """Stage name -> kind in the recipe's order."""
    import yaml

    try:
        stages = mapping(yaml.safe_load(recipe)).get("stages")
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append("recipe.yaml is not valid YAML; it is shown as it is.")
        return {}
    entries = [mapping(item) for item in sequence(stages)]
    return {str(entry["name"]): plain(entry.get("kind", "")) for entry in entries if folder_name(entry.get("name"))}


def _sources(folder: Path, notes: list[str]) -> tuple[tuple[DataSource, ...], dict[str, str]]:
    """The sources of the data stage's manifest, and those that were skipped with the reason."""
    manifest = mapping(_json(folder / "data" / "documents" / "manifest.json", notes))
    found = tuple(_data_source(name, mapping(entry)) for name, entry in mapping(manifest.get("sources")).items())
    return found, {name: plain(reason) for name, reason in mapping(manifest.get("skipped")).items()}


def _data_source(name: str, entry: Mapping[str, Any]) -> DataSource:
    dataset = mapping(entry.get("dataset")).get("name", "")
    origin = list(mapping(entry.get("archives"))) or entry.get("packages") or entry.get("path") or dataset
    licence, sizes = plain(entry.get("licence", "not stated")), (figure(entry.get("documents")), figure(entry.get("bytes")))
    return DataSource(name, plain(entry.get("domain", "")), plain(origin), licence, *sizes, plain(entry.get("dropped", "")))


def _layer_names(folder: Path, stages: tuple[Stage, ...], notes: list[str]) -> tuple[str, ...]:
    """A name for each row of the routing figures: the layer's index in the model, `MTP` for prediction layers, from a stage's config.json.

    Without a config that explains the number of rows they are numbered from 0.
    """
    rows = max((_routed_layers(stage.metrics) for stage in stages if stage.metrics), default=0)
    for path in sorted(folder.glob("*/model/config.json")):
        config = mapping(_json(path, notes))
        dense, layers = figure(config.get("first_k_dense_replace", 0)), figure(config.get("num_hidden_layers"))
        mtp = figure(config.get("num_nextn_predict_layers", 0))
        if layers - dense + mtp == rows and mtp >= 0 <= dense:
            extra = ["MTP"] if mtp == 1 else [f"MTP {depth + 1}" for depth in range(int(mtp))]
            return tuple([str(layer) for layer in range(int(dense), int(layers))] + extra)
    return tuple(str(layer) for layer in range(rows))


def _routed_layers(metrics: StageMetrics) -> int:
    loads = [load.shares.shape[0] for load in (metrics.first_load, metrics.last_load) if load]
    return max([values.shape[1] for values in metrics.layers.values()] + loads, default=0)
