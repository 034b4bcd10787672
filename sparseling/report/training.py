"""The report's sections about training: losses, validation, load balance, routing, speed, gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .charts import Axes, Band, Boundary, Flags, Level, Line, line_chart, line_table
from .collect import Run
from .heatmap import AROUND_ONE, VIOLATION, Grid, heat_map
from .metrics import ExpertLoad, StageMetrics
from .page import figure, missing, side_by_side, table
from .series import Curve, bin_columns, curve, join, over_layers, smooth, thin, window_for
from .words import bits, count, label, number, percent

FEW_LAYERS = 6  # up to so many, each layer gets a line of its own
HEAT_COLUMNS = 96
MOST_DOTS = 40
NO_TRAINING = "No stage has logged a training step yet: this is drawn from each training stage's metrics.jsonl."


@dataclass(frozen=True)
class Span:
    """One training stage on the common axis of tokens: it starts at `start`; `x` [steps] is its own count of tokens plus `shift`."""

    name: str
    metrics: StageMetrics
    start: float
    shift: float
    x: np.ndarray


def timeline(run: Run, without: str | None = None) -> list[Span]:
    """The training stages one after the other, those of the kind `without` left out. A stage that counts its tokens from 0 is moved behind
    the one before it."""
    spans: list[Span] = []
    end = 0.0
    for stage in run.trained:
        if stage.kind == without:
            continue
        assert stage.metrics is not None
        tokens = stage.metrics.scalars["tokens"]
        finite = tokens[np.isfinite(tokens)]
        if not len(finite):
            continue
        shift = end if finite[0] < end else 0.0
        spans.append(Span(stage.name, stage.metrics, end, shift, tokens + shift))
        end = max(end, float(finite.max()) + shift)
    return spans


def loss_section(run: Run) -> str:
    spans = timeline(run)
    lines = [*_raw_and_smooth(spans, "loss", "loss", 1), *_raw_and_smooth(spans, "mtp_loss", "MTP loss", 2)]
    if not lines:
        return missing(NO_TRAINING)
    text = (
        "Cross entropy per token: the moving mean without skipped steps, and all single steps behind it (faint). "
        "The multi-token prediction (MTP) loss is for the token after next."
    )
    return _line_figure("Training loss", text, Axes("nats per token"), lines, spans)


def validation_section(run: Run) -> str:
    """One panel a domain: its bits per byte over training, and the baselines on the same text as dashed lines.

    Fine-tuning is no longer about plain text and would stretch the axis: it stands in the table alone.
    """
    spans = timeline(run, without="sft") or timeline(run)
    reached = run.summary.validation_bits_per_byte
    logged = (item.bits_per_byte for span in spans for item in span.metrics.validations)
    domains = list(dict.fromkeys(domain for found in (*logged, reached) for domain in found))
    panels = []
    for domain in domains:
        points = _validation_curve(spans, domain)
        line = Line("model", points, 1, dots=len(points.x) <= MOST_DOTS)
        levels = [
            Level(f"{label(name)} {bits(values[domain])}", values[domain], colour=2 + index, dash=1 + index % 3)
            for index, (name, values) in enumerate(run.summary.baseline_bits_per_byte.items()) if domain in values
        ]
        final = f"The base model ends at {bits(reached[domain])} bits per byte." if domain in reached else ""
        panels.append(_line_figure(domain, final, Axes("bits per byte"), [line], spans, levels))
    if not panels:
        return missing("No validation has run yet: the training stages log validation_bits_per_byte in metrics.jsonl.")
    by_stage = {stage: found for stage, found in run.summary.validation_by_stage.items() if found}
    rows = [[stage, *(bits(found.get(domain, math.nan)) for domain in domains)] for stage, found in by_stage.items()]
    return side_by_side(*panels) + (figure("At the end of each stage", "Bits per byte.", table(["stage", *domains], rows)) if rows else "")


def balance_section(run: Run) -> str:
    spans = timeline(run)
    titles = {
        "max_violation": ("Most loaded expert", "How far it is above the mean load of its layer: 1 is twice the mean. Lower is better."),
        "min_violation": ("Least loaded expert", "How far it is below the mean load: 1 means that it got no token. Lower is better."),
        "load_entropy": ("Expert load entropy", "Of the load in a layer, as a share of its maximum: 1 is perfectly even."),
    }
    units = {"max_violation": "(max − mean) / mean", "min_violation": "(mean − min) / mean", "load_entropy": "share of log(experts)"}
    panels = []
    for name, (title, text) in titles.items():
        lines, bands = _layer_lines(spans, name, run.layer_names)
        if lines:
            top = 1.0 if name == "load_entropy" else None
            axes = Axes(units[name], log=name == "max_violation", top=top, zero=name == "min_violation")
            panels.append(_line_figure(title, text, axes, lines, spans, bands=bands))
    if not panels:
        return missing("No load balance has been logged yet (max_violation, min_violation, load_entropy in metrics.jsonl).")
    return side_by_side(*panels) + _violation_map(run, spans)


def routing_section(run: Run) -> str:
    loads = [(span.name, load) for span in timeline(run) for load in (span.metrics.first_load, span.metrics.last_load) if load]
    if not loads:
        return missing("No routing has been logged yet (expert_load in metrics.jsonl).")
    (last_stage, last), (first_stage, first) = loads[-1], loads[0]
    pictures = [_load_figure(run, "Last", last_stage, last)]
    if first is not last:
        pictures.append(_load_figure(run, "First, for comparison", first_stage, first))
    return side_by_side(*pictures) if last.shares.shape[1] <= 32 else "".join(pictures)


def speed_section(run: Run) -> str:
    spans = timeline(run)
    panels = []
    rate = _raw_and_smooth(spans, "tokens_per_second", "tokens per second", 1)
    if rate:
        text = f"Median {count(_median(spans, 'tokens_per_second'))} tokens/s."
        panels.append(_line_figure("Tokens per second", text, Axes("tokens/s", zero=True), rate, spans))
    used = _raw_and_smooth(spans, "mfu", "model FLOP utilisation", 4, factor=100.0)
    if used:
        text = f"Median {percent(_median(spans, 'mfu'))} of the measured matmul peak."
        panels.append(_line_figure("Model FLOP utilisation", text, Axes("% of peak", zero=True), used, spans))
    return side_by_side(*panels) if panels else missing(NO_TRAINING)


def gradient_section(run: Run) -> str:
    spans = timeline(run)
    skipped = np.concatenate([span.x[span.metrics.scalars["skipped"] == 1] for span in spans]) if spans else np.zeros(0)
    steps = sum(len(span.x) for span in spans)
    flags = Flags(f"skipped step ({len(skipped):,} of {steps:,})", [float(place) for place in skipped])
    panels = []
    lines = _raw_and_smooth(spans, "grad_norm", "gradient norm", 1)
    if lines:
        text = "Before clipping. A step whose loss or gradient spikes is skipped and its batch is put back for later."
        panels.append(_line_figure("Gradient norm", text, Axes("L2 norm", log=True), lines, spans, flags=flags))
    rate = join([curve(span.x, span.metrics.scalars["learning_rate"]) for span in spans])
    if np.isfinite(rate.y).any():
        text = "What the optimiser used; it is lowered for a step after repeated spikes."
        panels.append(_line_figure("Learning rate", text, Axes("learning rate", zero=True), [Line("learning rate", thin(rate), 3)], spans))
    return side_by_side(*panels) if panels else missing(NO_TRAINING)


def _median(spans: Sequence[Span], name: str) -> float:
    values = np.concatenate([span.metrics.scalars[name] for span in spans])
    return float(np.median(values[np.isfinite(values)]))


def _line_figure(
    title: str, text: str, axes: Axes, lines: Sequence[Line], spans: Sequence[Span],
    levels: Sequence[Level] = (), bands: Sequence[Band] = (), flags: Flags | None = None,
) -> str:
    stages = [Boundary(span.start, span.name) for span in spans]
    return figure(title, text, line_chart(title, axes, lines, bands, levels, stages, flags), line_table(axes, lines))


def _raw_and_smooth(spans: Sequence[Span], key: str, name: str, colour: int, factor: float = 1.0) -> list[Line]:
    """The single steps as a faint line and their moving mean; only the steps when they are few; nothing when none was logged."""
    curves = [curve(span.x, span.metrics.scalars[key] * factor) for span in spans]
    if not any(np.isfinite(item.y).any() for item in curves):
        return []
    # Skipped steps changed nothing in the model; in the mean they would make bumps as wide as its window.
    used = [span.metrics.scalars["skipped"] != 1 for span in spans]
    kept = [curve(span.x[keep], span.metrics.scalars[key][keep] * factor) for span, keep in zip(spans, used, strict=True)]
    smoothed = [smooth(item, window_for(len(item.x))) for item in kept]
    raw = Line(name, thin(join(curves)), colour, faint=True)
    mean = Line(name, thin(join(smoothed)), colour)
    return [raw, mean] if any(window_for(len(item.x)) > 1 for item in curves) else [mean]


def _validation_curve(spans: Sequence[Span], domain: str) -> Curve:
    """One line over all stages: the text is the same, and a short stage may have validated once."""
    seen = [(span, item) for span in spans for item in span.metrics.validations if domain in item.bits_per_byte]
    return thin(curve([item.tokens + span.shift for span, item in seen], [item.bits_per_byte[domain] for _, item in seen]))


def _layer_lines(spans: Sequence[Span], name: str, layer_names: Sequence[str]) -> tuple[list[Line], list[Band]]:
    """A line a layer when there are few, else the median, the extremes and the area between them."""
    pieces = [(span.x, span.metrics.layers[name]) for span in spans if name in span.metrics.layers]
    if not pieces:
        return [], []
    widest = max(values.shape[1] for _, values in pieces)
    if widest <= FEW_LAYERS:
        lines = []
        for layer in range(widest):
            curves = [curve(x, values[:, layer]) for x, values in pieces if layer < values.shape[1]]
            smoothed = thin(join([smooth(item, window_for(len(item.x))) for item in curves]))
            lines.append(Line(_layer_title(layer_names, layer), smoothed, layer + 1, layer % 4))
        return lines, []
    extremes: list[list[Curve]] = [[], [], []]
    for x, values in pieces:
        for kind, edge in zip(extremes, over_layers(values), strict=True):
            item = curve(x, edge)
            kind.append(smooth(item, window_for(len(item.x))))
    low, middle, high = (_even(join(kind)) for kind in extremes)
    lines = [Line("highest layer", high, 2, 1), Line("median layer", middle, 1), Line("lowest layer", low, 3, 2)]
    return lines, [Band("all layers", low, high, 1)]


def _even(line: Curve, points: int = 400) -> Curve:
    """Every n-th point of a smoothed line: the edges of an area need the same x on both sides."""
    keep = np.unique(np.linspace(0, len(line.x) - 1, min(points, len(line.x))).astype(int))
    return Curve(line.x[keep], line.y[keep])


def _layer_title(names: Sequence[str], layer: int) -> str:
    name = names[layer] if layer < len(names) else str(layer)
    return name if name.startswith("MTP") else f"layer {name}"


def _violation_map(run: Run, spans: Sequence[Span]) -> str:
    """Max violation as a heat map, layers × tokens, over all stages."""
    pieces = [(span.x, span.metrics.layers["max_violation"]) for span in spans if "max_violation" in span.metrics.layers]
    layers = max((values.shape[1] for _, values in pieces), default=0)
    if not layers:
        return ""
    x = np.concatenate([x for x, _ in pieces])
    values = np.concatenate([np.pad(v.astype(float), ((0, 0), (0, layers - v.shape[1])), constant_values=np.nan) for _, v in pieces])
    known = np.isfinite(x)
    end = float(x[known].max())
    columns = int(min(HEAT_COLUMNS, max(1, known.sum() // 2)))
    binned = bin_columns(x[known], values[known], columns, end)
    grid = Grid(
        tuple(_layer_title(run.layer_names, layer).removeprefix("layer ") for layer in range(layers)),
        "tokens trained", "(max − mean) / mean", whole=False, width=end / columns,
    )
    picture = heat_map("Load of the most loaded expert by layer and tokens trained", binned, grid, VIOLATION)
    rows = [[_layer_title(run.layer_names, layer), *(number(value, 3) for value in _quarters(binned[layer]))] for layer in range(layers)]
    data = table(["layer", "first quarter", "second", "third", "last quarter"], rows)
    text = "Each row is a layer; a cell is the mean over the steps in a stretch of training."
    return figure("Most loaded expert, layer by layer", text, picture, data)


def _quarters(row: np.ndarray) -> list[float]:
    parts = [part[np.isfinite(part)] for part in np.array_split(row, 4)]
    return [float(part.mean()) if len(part) else math.nan for part in parts]


def _load_figure(run: Run, title: str, stage: str, load: ExpertLoad) -> str:
    """Layers × experts: each expert's share of its layer's tokens, relative to an even split."""
    mean = np.nanmean(np.where(np.isfinite(load.shares), load.shares, 0.0), axis=1, keepdims=True)
    relative = load.shares / np.where(mean > 0, mean, np.nan)
    layers = load.shares.shape[0]
    names = tuple(_layer_title(run.layer_names, layer).removeprefix("layer ") for layer in range(layers))
    spoken = f"Share of tokens by layer and expert, {title.lower()} logged, stage {stage}, step {load.step:,}"
    picture = heat_map(spoken, relative, Grid(names, "expert", "× an even share", whole=True), AROUND_ONE)
    rows = [_load_row(_layer_title(run.layer_names, layer), relative[layer]) for layer in range(layers)]
    data = table(["layer", "busiest expert", "× even", "idlest expert", "× even", "under half its share"], rows)
    return figure(title, f"Stage {stage}, step {load.step:,}. Rows are layers.", picture, data)


def _load_row(name: str, relative: np.ndarray) -> list[str]:
    if not np.isfinite(relative).any():
        return [name, "–", "–", "–", "–", "–"]
    top, bottom = int(np.nanargmax(relative)), int(np.nanargmin(relative))
    idle = int((relative < 0.5).sum())
    return [name, str(top), number(float(relative[top]), 3), str(bottom), number(float(relative[bottom]), 3), f"{idle} experts"]
