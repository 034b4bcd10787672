"""Heat maps as strings: one path a colour with runs of equal cells joined, so that 80 layers × 256 experts stay small."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from .charts import NOTHING, column_tick, share, stretch
from .page import missing, tag
from .scales import run_scale
from .words import escape


@dataclass(frozen=True)
class Ramp:
    """Colour steps: step i holds values from `starts[i]`, the last is open.

    `kind` is the prefix of its nine style classes: "v0" … "v8" diverge from the middle, "q0" … "q8" grow from nothing.
    """

    kind: str
    starts: tuple[float, ...]
    labels: tuple[str, ...]


AROUND_ONE = Ramp("v", (0, 0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2, 4), ("0", "¼", "½", "¾", "0.9", "1.1", "1⅓", "2", "4"))
VIOLATION = Ramp("q", (0, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 4), ("0", "0.1", "0.2", "0.3", "0.5", "¾", "1", "2", "4"))


@dataclass(frozen=True)
class Grid:
    """Names around a heat map, and where its columns stand: column c begins at `first + c * width` of what `column_name` counts.

    `whole` columns are things (experts) and named at their middle; others are stretches of an axis and named at their start.
    """

    row_names: tuple[str, ...]
    column_name: str
    value_name: str
    whole: bool
    first: float = 0.0
    width: float = 1.0


def heat_map(label: str, values: np.ndarray, grid: Grid, ramp: Ramp) -> str:
    """`values` [rows, columns] as coloured cells; NaN stays empty. With nothing to draw, a sentence says so."""
    rows, columns = values.shape
    if not np.isfinite(values).any():
        return missing(NOTHING)
    height = min(480.0, max(7.0, min(26.0, 320 / rows)) * rows)
    svg = tag(
        "svg", stretch(columns, rows, *_cells(values, ramp)), _row_ticks(grid, height), _column_ticks(grid, columns),
        class_="heat", style=f"height:{height:.0f}px", role="img", aria_label=label, data_rows="|".join(grid.row_names),
        data_column=grid.column_name, data_first=grid.first, data_width=grid.width, data_value=grid.value_name, data_values=_packed(values),
    )
    steps = (tag("span", tag("i", class_=f"{ramp.kind}{index}"), text, class_="step") for index, text in enumerate(ramp.labels))
    legend = tag("div", tag("span", escape(f"{grid.value_name}, from"), class_="name"), *steps, class_="ramp")
    plot = tag("div", svg, class_="plot", tabindex="0")
    return tag("div", legend, plot, tag("p", escape(grid.column_name), class_="axis"), class_="chart")


def _cells(values: np.ndarray, ramp: Ramp) -> list[str]:
    paths: list[list[str]] = [[] for _ in ramp.starts]
    for row, line in enumerate(values):
        steps = [max(0, bisect_right(ramp.starts, value) - 1) if math.isfinite(value) else -1 for value in line]
        start = 0
        for column in range(1, len(steps) + 1):
            if column == len(steps) or steps[column] != steps[start]:
                if steps[start] >= 0:
                    paths[steps[start]].append(f"M{start} {row}h{column - start}v1h-{column - start}z")
                start = column
    return [tag("path", class_=f"{ramp.kind}{step}", d="".join(path)) for step, path in enumerate(paths) if path]


def _packed(values: np.ndarray) -> str:
    """Three significant digits a cell, for the reader's pointer."""
    return ";".join(" ".join(f"{value:.3g}" if math.isfinite(value) else "-" for value in row) for row in values)


def _row_ticks(grid: Grid, height: float) -> str:
    rows = len(grid.row_names)
    every = max(1, math.ceil(14 * rows / height))
    return "".join(
        tag("text", escape(name), class_="tick y", x="0", y=share((row + 0.5) / rows), dx="-8", dy="0.32em")
        for row, name in enumerate(grid.row_names) if row % every == 0
    )


def _column_ticks(grid: Grid, columns: int) -> str:
    middle = 0.5 if grid.whole else 0.0
    scale = run_scale([grid.first, grid.first + grid.width * (columns - 2 * middle)])
    ticks = [
        (((tick - grid.first) / grid.width + middle) / columns, text)
        for tick, text in zip(scale.ticks, scale.labels, strict=True) if not grid.whole or float(tick).is_integer()
    ]
    return "".join(column_tick(index, place, text) for index, (place, text) in enumerate(ticks) if 0 <= place <= 1)
