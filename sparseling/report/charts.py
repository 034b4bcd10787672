"""Line charts as strings: data in, well-formed HTML with inline SVG out. Pure functions; colours and dashes are classes of style.css.

An SVG scaled as a whole has unreadable text on a phone. So the plot area stretches (a nested SVG with a 1000 × 1000 view box and strokes
that do not scale) while ticks and marks stand at percentages of it, in the page's own font size. Margins are the style sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .page import missing, table, tag
from .scales import Scale, drawable, run_scale, value_scale
from .series import Curve
from .words import count, escape, number

COLOURS = 8  # classes c1 … c8
DASHES = 4  # classes d0 (solid) … d3
NOTHING = "There are no finite values to draw here."


@dataclass(frozen=True)
class Line:
    """One line of a chart. A `faint` line is the raw data behind a smoothed one: drawn, not listed. `dots` marks every point."""

    name: str
    curve: Curve
    colour: int = 1
    dash: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Band:
    """A filled area between two curves over the same x."""

    name: str
    low: Curve
    high: Curve
    colour: int = 1


@dataclass(frozen=True)
class Level:
    """A horizontal dashed line, such as a baseline."""

    name: str
    value: float
    colour: int = 2
    dash: int = 1


@dataclass(frozen=True)
class Boundary:
    """Where a stage starts on the x axis."""

    x: float
    name: str


@dataclass(frozen=True)
class Flags:
    """Marked places on the x axis (steps skipped), and what the mark means."""

    name: str
    places: Sequence[float]


@dataclass(frozen=True)
class Axes:
    """What the axes mean. `top` is a value that the y axis must reach; `log` is granted to data that spans widely."""

    y: str
    x: str = "tokens trained"
    zero: bool = False
    log: bool = False
    top: float | None = None


def line_chart(
    label: str, axes: Axes, lines: Sequence[Line], bands: Sequence[Band] = (), levels: Sequence[Level] = (),
    stages: Sequence[Boundary] = (), flags: Flags | None = None,
) -> str:
    """Lines over a run's progress, with stage boundaries, horizontal levels and flagged places (triangles at the top).

    Values that are not finite break a line; infinite ones are counted beneath. With nothing to draw, a sentence says so.
    """
    curves = [line.curve for line in lines] + [edge for band in bands for edge in (band.low, band.high)]
    if not any(np.isfinite(item.y).any() for item in curves):
        return missing(NOTHING)
    flagged = np.array(flags.places if flags else [], dtype=float)
    x_scale = run_scale(np.concatenate([item.x for item in curves] + [flagged]))
    heights = np.concatenate([item.y for item in curves] + [np.array([level.value for level in levels], dtype=float)])
    y_scale = value_scale(heights, zero=axes.zero, log=axes.log, top=axes.top)
    shapes = [_band(band, x_scale, y_scale) for band in bands] + [_path(line, x_scale, y_scale) for line in lines]
    svg = tag(
        "svg", _grid(x_scale, y_scale), _stage_marks(stages, x_scale), stretch(1000, 1000, *shapes),
        *(_level(level, y_scale) for level in levels), *(_dots(line, x_scale, y_scale) for line in lines if line.dots),
        _flags(flagged, x_scale),
        class_="lines", role="img", aria_label=_spoken(label, lines), data_x=f"{x_scale.low!r} {x_scale.high!r}",
        data_y=f"{y_scale.low!r} {y_scale.high!r}", data_log=int(y_scale.log), data_unit=axes.x,
    )
    unit = axes.y + (" (logarithmic scale)" if y_scale.log else "")
    infinite = sum(int(np.isinf(line.curve.y).sum()) for line in lines)
    return tag(
        "div", _legend(lines, bands, levels, stages, flags), tag("p", escape(unit), class_="unit"),
        tag("div", svg, class_="plot", tabindex="0"), tag("p", escape(axes.x), class_="axis"),
        tag("p", f"Not drawn: {infinite:,} infinite values.", class_="note") if infinite else "", class_="chart",
    )


def line_table(axes: Axes, lines: Sequence[Line], rows: int = 24) -> str:
    """The lines' values at up to `rows` places along the x axis, as a table: at each place the nearest point that is finite."""
    shown = [(line, np.flatnonzero(np.isfinite(line.curve.y))) for line in lines if not line.faint]
    shown = [(line, good) for line, good in shown if len(good)]
    if not shown:
        return ""
    places = np.unique(np.concatenate([line.curve.x[good] for line, good in shown]))
    places = places[np.unique(np.linspace(0, len(places) - 1, min(rows, len(places))).astype(int))]
    body = []
    for place in places:
        nearest = [(line, good[np.argmin(np.abs(line.curve.x[good] - place))]) for line, good in shown]
        body.append([count(float(place), 4), *(number(float(line.curve.y[index])) for line, index in nearest)])
    return table([axes.x, *(line.name for line, _ in shown)], body, numbers_from=0)


def stretch(width: int, height: int, *shapes: str) -> str:
    """A drawing of `width` × `height` units that fills its parent, whatever the parent's shape."""
    return tag("svg", *shapes, class_="stretch", viewBox=f"0 0 {width} {height}", preserveAspectRatio="none", width="100%", height="100%")


def share(place: float) -> str:
    """A place from 0 to 1 as an SVG length."""
    return f"{100 * place:.2f}%"


def column_tick(index: int, place: float, text: str) -> str:
    """A label under the x axis; every second one is left out on narrow screens."""
    return tag("text", escape(text), class_=f"tick x{' odd' if index % 2 else ''}", x=share(place), y="100%", dy="18")


def swatch(shape: str) -> str:
    """A small sample of a line or area for a legend."""
    return tag("svg", shape, class_="swatch", width="26", height="10", aria_hidden="true")


def _spoken(label: str, lines: Sequence[Line]) -> str:
    """What a screen reader says in place of the picture."""
    parts = [label]
    for line in lines:
        seen = line.curve.y[np.isfinite(line.curve.y)]
        if len(seen) and not line.faint:
            ends = f"first {number(seen[0])}, last {number(seen[-1])}, lowest {number(seen.min())}, highest {number(seen.max())}"
            parts.append(f"{line.name}: {ends}")
    return ". ".join(parts)


def _grid(x_scale: Scale, y_scale: Scale) -> str:
    parts = []
    for tick, text in zip(y_scale.ticks, y_scale.labels, strict=True):
        y = share(1 - y_scale.place(tick))
        parts.append(tag("line", class_="grid", x1="0", x2="100%", y1=y, y2=y))
        parts.append(tag("text", escape(text), class_="tick y", x="0", y=y, dx="-8", dy="0.32em"))
    columns = zip(x_scale.ticks, x_scale.labels, strict=True)
    return "".join(parts) + "".join(column_tick(index, x_scale.place(tick), text) for index, (tick, text) in enumerate(columns))


def _path(line: Line, x_scale: Scale, y_scale: Scale) -> str:
    """The line in the 1000 × 1000 box: `Mx yLx y x y …` for each stretch without breaks."""
    pieces: list[str] = []
    drawing = False
    for x, y in zip(line.curve.x, line.curve.y, strict=True):
        right, down = 1000 * x_scale.place(float(x)), 1000 * (1 - y_scale.place(float(y)))
        if math.isnan(down) or math.isnan(right):
            drawing = False
            continue
        # A stretch starts with a line to itself: should the point stay alone, round caps make it a dot.
        pieces.append(f" {right:.1f} {down:.1f}" if drawing else f"M{right:.1f} {down:.1f}L{right:.1f} {down:.1f}")
        drawing = True
    kind = "line faint" if line.faint else "line"
    return tag("path", class_=f"{kind} {_style(line.colour, line.dash)}", data_name=line.name, d="".join(pieces))


def _dots(line: Line, x_scale: Scale, y_scale: Scale) -> str:
    """Outside the stretched box, where a circle stays round."""
    places = ((x_scale.place(float(x)), 1 - y_scale.place(float(y))) for x, y in zip(line.curve.x, line.curve.y, strict=True))
    style = f"dot {_style(line.colour)}"
    return "".join(tag("circle", class_=style, cx=share(x), cy=share(y), r="3") for x, y in places if not (math.isnan(x) or math.isnan(y)))


def _band(band: Band, x_scale: Scale, y_scale: Scale) -> str:
    corners = [*zip(band.low.x, band.low.y, strict=True), *zip(band.high.x[::-1], band.high.y[::-1], strict=True)]
    places = [(1000 * x_scale.place(float(x)), 1000 * (1 - y_scale.place(float(y)))) for x, y in corners]
    points = " ".join(f"{right:.1f},{down:.1f}" for right, down in places if not (math.isnan(right) or math.isnan(down)))
    return tag("polygon", class_=f"band {_style(band.colour)}", points=points)


def _level(level: Level, y_scale: Scale) -> str:
    place = y_scale.place(level.value)
    if math.isnan(place):
        return ""
    y = share(1 - place)
    return tag("line", class_=f"level {_style(level.colour, level.dash)}", data_name=level.name, x1="0", x2="100%", y1=y, y2=y)


def _stage_marks(stages: Sequence[Boundary], x_scale: Scale) -> str:
    """A line where each stage starts and its number beside it; numbers too close to the one before stand a row lower."""
    parts, row, last = [], 0, -1.0
    for index, stage in enumerate(stages if len(stages) > 1 else ()):
        place = x_scale.place(stage.x)
        row = (row + 1) % 3 if place - last < 0.05 else 0
        last = place
        if index:
            parts.append(tag("line", class_="stage", x1=share(place), x2=share(place), y1="0", y2="100%"))
        parts.append(tag("text", str(index + 1), class_="stage-number", x=share(place), y=-7, dx=2 + 11 * row))
    return "".join(parts)


def _flags(places: np.ndarray, x_scale: Scale) -> str:
    """Triangles at the flagged places; those that would cover one another are drawn once."""
    shown = sorted({round(x_scale.place(float(x)), 3) for x in places if drawable(float(x))})
    return "".join(tag("text", "▼", class_="flag", x=share(place), y="0", dy="9") for place in shown)


def _legend(
    lines: Sequence[Line], bands: Sequence[Band], levels: Sequence[Level], stages: Sequence[Boundary], flags: Flags | None
) -> str:
    if len(lines) == 1 and not bands and not levels:
        lines = ()  # the title names it
    flat = {"x1": "1", "x2": "25", "y1": "5", "y2": "5"}
    items = [(tag("line", class_=f"line {_style(item.colour, item.dash)}", **flat), item.name) for item in lines if not item.faint]
    items += [(tag("rect", class_=f"band {_style(item.colour)}", width="26", height="10"), item.name) for item in bands]
    items += [
        (tag("line", class_=f"level {_style(item.colour, item.dash)}", **flat), item.name) for item in levels
    ]
    entries = [tag("li", swatch(shape), escape(name)) for shape, name in items]
    if flags and len(flags.places):
        entries.append(tag("li", tag("span", "▼", class_="flag", aria_hidden="true"), escape(f" {flags.name}")))
    if len(stages) > 1:
        entries += [tag("li", tag("b", str(place)), escape(f" {stage.name}"), class_="stage-name") for place, stage in enumerate(stages, 1)]
    return tag("ul", *entries, class_="legend")


def _style(colour: int, dash: int = 0) -> str:
    return f"c{(colour - 1) % COLOURS + 1} d{dash % DASHES}"
