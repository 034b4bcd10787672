"""metrics.jsonl -> arrays: tolerant of a broken last line, of missing figures, and of steps that were run again after a restart."""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..progress import bar
from .scales import LARGEST

SCALARS = (
    "tokens", "loss", "mtp_loss", "z_loss", "grad_norm", "learning_rate", "batch_sequences",
    "tokens_per_second", "flops_per_second", "mfu", "skipped", "seconds",
)
LAYERED = ("max_violation", "min_violation", "load_entropy")
SHOW_PROGRESS_BYTES = 20_000_000


@dataclass(frozen=True)
class Validation:
    """Validation bits per byte by domain after `tokens` tokens of the stage."""

    step: int
    tokens: float
    bits_per_byte: dict[str, float]


@dataclass(frozen=True)
class ExpertLoad:
    """Share of the routed tokens per expert: `shares` [layers, experts], NaN where a layer has fewer experts."""

    step: int
    tokens: float
    shares: np.ndarray


@dataclass(frozen=True)
class StageMetrics:
    """What one stage logged. `scalars[name]` [steps] and `layers[name]` [steps, layers] are NaN where a line lacks the figure."""

    steps: np.ndarray
    scalars: dict[str, np.ndarray]
    layers: dict[str, np.ndarray]
    validations: tuple[Validation, ...] = ()
    first_load: ExpertLoad | None = None
    last_load: ExpertLoad | None = None
    broken_lines: int = 0


def figure(value: object) -> float:
    """A JSON value as a float: NaN for anything that is not a number, infinite for what cannot be reckoned with."""
    if not isinstance(value, int | float):
        return math.nan
    if abs(value) > LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def read_metrics(path: Path) -> StageMetrics:
    """Read a stage's metrics.jsonl line by line (memory: the numbers, never the text).

    A line that is not a JSON object with a whole `step` is counted and skipped: a killed run leaves a broken last one. When steps
    start over (a restart from an earlier checkpoint), what was logged from there on is superseded.
    """
    log = _Log()
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if size > SHOW_PROGRESS_BYTES:
            with bar(f"reading {path.parent.name}/{path.name}", total=size) as line_bar:
                for line in stream:
                    log.take(line)
                    line_bar.advance(len(line))
        else:
            for line in stream:
                log.take(line)
    return log.finish()


@dataclass
class _Log:
    """Metrics so far. `rows[name]` is flat: `width[name]` numbers a step."""

    steps: list[int] = field(default_factory=list)
    scalars: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in SCALARS})
    rows: dict[str, array[float]] = field(default_factory=lambda: {name: array("f") for name in LAYERED})
    width: dict[str, int] = field(default_factory=dict)
    validations: list[Validation] = field(default_factory=list)
    first_load: ExpertLoad | None = None
    last_load: ExpertLoad | None = None
    broken: int = 0

    def take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        step = figure(entry.get("step")) if isinstance(entry, dict) else math.nan
        if not 0 <= step < 2**62:  # NaN too
            self.broken += 1
            return
        if "loss" in entry:
            self._train(int(step), entry)
        if isinstance(entry.get("validation_bits_per_byte"), dict):
            self._validation(int(step), entry)
        if isinstance(entry.get("expert_load"), list):
            self._load(int(step), entry)

    def _train(self, step: int, entry: Mapping[str, Any]) -> None:
        if self.steps and step <= self.steps[-1]:
            self._rewind(step)
        for name in LAYERED:
            values = entry.get(name)
            values = [figure(value) for value in values] if isinstance(values, list) else []
            width = self.width.setdefault(name, len(values)) if values else self.width.get(name, 0)
            # The first line that has the figure decides the width; steps before it had none.
            self.rows[name].extend([math.nan] * (len(self.steps) * width - len(self.rows[name])))
            self.rows[name].extend((_single(values) + [math.nan] * width)[:width])
        self.steps.append(step)
        for name in SCALARS:
            self.scalars[name].append(figure(entry.get(name)))

    def _rewind(self, step: int) -> None:
        """Forget all from `step` on: it is being run again."""
        cut = bisect_left(self.steps, step)
        del self.steps[cut:]
        for column in self.scalars.values():
            del column[cut:]
        for name, width in self.width.items():
            del self.rows[name][cut * width :]
        self.validations = [item for item in self.validations if item.step < step]

    def _validation(self, step: int, entry: Mapping[str, Any]) -> None:
        found = {str(domain): figure(value) for domain, value in entry["validation_bits_per_byte"].items()}
        self.validations = [item for item in self.validations if item.step < step]
        self.validations.append(Validation(step, figure(entry.get("tokens")), found))

    def _load(self, step: int, entry: Mapping[str, Any]) -> None:
        layers = [[figure(value) for value in layer] for layer in entry["expert_load"] if isinstance(layer, list) and layer]
        if layers:
            width = max(len(layer) for layer in layers)
            shares = np.array([layer + [math.nan] * (width - len(layer)) for layer in layers])
            self.last_load = ExpertLoad(step, figure(entry.get("tokens")), shares)
            self.first_load = self.first_load or self.last_load

    def finish(self) -> StageMetrics:
        count = len(self.steps)
        scalars = {name: np.array(column, dtype=float) for name, column in self.scalars.items()}
        layers = {
            name: np.array(self.rows[name], dtype=np.float32).reshape(count, width)
            for name, width in self.width.items() if len(self.rows[name]) == count * width and count
        }
        return StageMetrics(
            np.array(self.steps, dtype=np.int64), scalars, layers, tuple(self.validations), self.first_load, self.last_load, self.broken
        )


def _single(values: list[float]) -> list[float]:
    """Values that a 32-bit float can hold; larger ones become infinite, as array("f") refuses them."""
    return [value if abs(value) <= 3e38 or not math.isfinite(value) else math.copysign(math.inf, value) for value in values]
