"""summary.json -> typed figures. Whatever is absent or of another kind than expected is NaN or empty, never an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .metrics import figure
from .words import count, file_size


@dataclass(frozen=True)
class Score:
    """Exact-match accuracy as shares of 1 with the ends of its 95 % interval; `samples` prompts."""

    accuracy: float
    low: float
    high: float
    samples: float
    constant_baseline: float


@dataclass(frozen=True)
class Sample:
    """One answer of the model; `thinking` is its reasoning."""

    task: str
    mode: str
    prompt: str
    thinking: str
    answer: str
    expected: str
    correct: bool


@dataclass(frozen=True)
class Merge:
    """Validation bits per byte by domain of the last checkpoint of stage `of`, and of the one that stage `stage` merged."""

    stage: str
    of: str
    last: dict[str, float]
    merged: dict[str, float]


Scores = dict[str, dict[str, Score]]  # task -> mode -> score


@dataclass(frozen=True)
class Summary:
    """The run's figures; NaN and empty where they are not known yet."""

    seconds_total: float = math.nan
    seconds_by_stage: dict[str, float] = field(default_factory=dict)
    validation_bits_per_byte: dict[str, float] = field(default_factory=dict)
    validation_by_stage: dict[str, dict[str, float]] = field(default_factory=dict)
    baseline_bits_per_byte: dict[str, dict[str, float]] = field(default_factory=dict)
    accuracy: Scores = field(default_factory=dict)
    accuracy_by_stage: dict[str, Scores] = field(default_factory=dict)
    parameters_total: float = math.nan
    parameters_active: float = math.nan
    tokens_trained: float = math.nan
    merge_gain: float = math.nan
    merges: tuple[Merge, ...] = ()
    samples: tuple[Sample, ...] = ()
    machine: dict[str, str] = field(default_factory=dict)
    stages: tuple[str, ...] = ()


def gathered(outputs: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What a summary would say of the (stage, outputs) that are there: figures of a run that has no summary.json yet."""
    known: dict[str, Any] = {"merge": {}, "accuracy_by_stage": {}, "samples": [], "validation_bits_per_byte_by_stage": {}}
    for stage, found in outputs:
        if "baseline_bits_per_byte" in found:
            known["baseline_bits_per_byte"] = found["baseline_bits_per_byte"]
        if "validation_bits_per_byte" in found:
            known["validation_bits_per_byte_by_stage"][stage] = found["validation_bits_per_byte"]
        if "merged" in found:
            known["merge"][stage] = found
        known["accuracy_by_stage"] |= mapping(found.get("accuracy_by_stage"))
        known["samples"] += sequence(found.get("samples"))
    return known


def summary_from(raw: object) -> Summary:
    """The figures of a parsed summary.json."""
    entry = mapping(raw)
    return Summary(
        seconds_total=figure(entry.get("seconds_total")),
        seconds_by_stage=figures(entry.get("seconds_by_stage")),
        validation_bits_per_byte=figures(entry.get("validation_bits_per_byte")),
        validation_by_stage={stage: figures(value) for stage, value in mapping(entry.get("validation_bits_per_byte_by_stage")).items()},
        baseline_bits_per_byte={name: figures(value) for name, value in mapping(entry.get("baseline_bits_per_byte")).items()},
        accuracy=_scores(entry.get("accuracy")),
        accuracy_by_stage={stage: _scores(value) for stage, value in mapping(entry.get("accuracy_by_stage")).items()},
        parameters_total=figure(entry.get("parameters_total")),
        parameters_active=figure(entry.get("parameters_active")),
        tokens_trained=figure(entry.get("tokens_trained")),
        merge_gain=figure(entry.get("merge_gain")),
        merges=tuple(
            Merge(stage, plain(mapping(value).get("of", "")), figures(mapping(value).get("last")), figures(mapping(value).get("merged")))
            for stage, value in mapping(entry.get("merge")).items()
        ),
        samples=tuple(_sample(item) for item in sequence(entry.get("samples")) if isinstance(item, dict)),
        machine=dict(_fact(name, value) for name, value in mapping(entry.get("machine")).items()),
        stages=tuple(name for name in (folder_name(mapping(stage).get("name")) for stage in sequence(entry.get("stages"))) if name),
    )


def mapping(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping (its keys made strings), else an empty one."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def sequence(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def figures(value: object) -> dict[str, float]:
    """The entries of a mapping that are numbers."""
    return {key: figure(item) for key, item in mapping(value).items() if not math.isnan(figure(item))}


def plain(value: object) -> str:
    """A JSON value as a reader expects it: lists with commas, mappings as `key value`."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)


def folder_name(value: object) -> str:
    """The value if it can be the name of a folder inside a run, else an empty string: names become paths."""
    usable = isinstance(value, str) and value.isprintable() and "/" not in value and value not in (".", "..") and len(value.encode()) <= 255
    return str(value) if usable else ""


def _fact(name: str, value: object) -> tuple[str, str]:
    """A machine's property in words: names that end in a unit give it to the value."""
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes"), file_size(figure(value))
    if name.endswith("_flops"):
        return name.removesuffix("_flops"), f"{count(figure(value)).replace('B', 'G')}FLOP/s"
    return name, plain(value)


def _scores(value: object) -> Scores:
    result: Scores = {}
    for task, modes in mapping(value).items():
        for mode, raw in mapping(modes).items():
            entry = mapping(raw)
            names = ("accuracy", "low", "high", "n", "constant_baseline")
            score = Score(*(figure(entry.get(name)) for name in names))
            if not math.isnan(score.accuracy):
                result.setdefault(task, {})[mode] = score
    return result


def _sample(entry: Mapping[str, Any]) -> Sample:
    names = ("task", "mode", "prompt", "reasoning", "answer", "expected")
    task, mode, prompt, thinking, answer, expected = (plain(entry.get(name) or "").strip() for name in names)
    return Sample(task, mode, prompt, thinking, answer, expected, entry.get("correct") is True)
