"""Bars: with intervals, of changes, of lengths; as lists of rows: label, small SVG on a shared scale, and the figures as text.

The rows are a list with readable text, so a screen reader needs no other form of them; on a phone the SVG moves under its label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .charts import COLOURS, share
from .page import tag
from .scales import drawable, value_scale
from .words import NARROW, bits, escape, percent, signed


@dataclass(frozen=True)
class Bar:
    """A share of 1 with its interval, and what a constant answer would reach; NaN where not known."""

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    baseline: float = math.nan
    colour: int = 1


@dataclass(frozen=True)
class Change:
    """A figure before and after."""

    label: str
    before: float
    after: float


def interval_bars(label: str, groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Horizontal bars from 0 to 100 % in named groups, each with its interval as a whisker and a tick at the baseline."""
    parts = []
    for name, bars in groups:
        rows = [_row(bar.label, _bar(bar), _bar_text(bar)) for bar in bars]
        parts.append(tag("li", tag("h4", escape(name)), tag("ul", *rows), class_="group"))
    axis = _axis([(place / 100, f"{place}{NARROW}%") for place in (0, 25, 50, 75, 100)])
    return tag("ul", *parts, axis, class_="bars", aria_label=label)


def change_bars(label: str, changes: Sequence[Change]) -> str:
    """A bar a change, in per cent of the figure before, to the left of the zero line where it fell, and both figures as text."""
    relative = [100 * (item.after / item.before - 1) if item.before > 0 else math.nan for item in changes]
    scale = value_scale(relative, zero=True)
    zero = scale.place(0.0)
    rows = []
    for item, value in zip(changes, relative, strict=True):
        marks = [tag("line", class_="zero", x1=share(zero), x2=share(zero), y1="0", y2="20")]
        if drawable(value):
            start, end = sorted((zero, scale.place(value)))
            colour = "c3" if value < 0 else "c2"
            marks.append(tag("rect", class_=f"fill {colour}", x=share(start), y="4", width=share(end - start), height="12"))
        figures = f"{bits(item.before)} → {tag('b', bits(item.after))} {tag('small', f'{signed(value, 2)}{NARROW}%')}"
        rows.append(_row(item.label, tag("svg", *marks, class_="bar", aria_hidden="true"), figures))
    shown = (scale.ticks[0], 0.0, scale.ticks[-1])  # the bars are narrow: more would run into each other
    ticks = [(scale.place(tick), f"{text}{NARROW}%") for tick, text in zip(scale.ticks, scale.labels, strict=True) if tick in shown]
    return tag("ul", *rows, _axis(ticks), class_="bars", aria_label=label)


def length_bars(label: str, rows: Sequence[tuple[str, float, str]]) -> str:
    """Bars from zero to the largest value: (label, value, the value as text) each."""
    longest = max((value for _, value, _ in rows if drawable(value)), default=0.0)
    parts = []
    for name, value, text in rows:
        width = value / longest if drawable(value) and longest > 0 else 0.0
        fill = tag("rect", class_="fill c1", x="0", y="4", width=_inside(width), height="12", rx="2")
        parts.append(_row(name, tag("svg", fill, class_="bar", aria_hidden="true"), escape(text)))
    return tag("ul", *parts, class_="bars", aria_label=label)


def _row(label: str, picture: str, figures: str) -> str:
    return tag("li", tag("span", escape(label), class_="label"), picture, tag("span", figures, class_="value"), class_="row")


def _axis(ticks: Sequence[tuple[float, str]]) -> str:
    texts = (
        tag("text", escape(text), class_="tick x odd" if index % 2 and len(ticks) > 3 else "tick x", x=share(place), y="12")
        for index, (place, text) in enumerate(ticks)
    )
    cells = (tag("span", class_="label"), tag("svg", *texts, class_="bar"), tag("span", class_="value"))
    return tag("li", *cells, class_="row scale", aria_hidden="true")


def _bar(bar: Bar) -> str:
    parts = [tag("line", class_="grid", x1=f"{place}%", x2=f"{place}%", y1="0", y2="100%") for place in (0, 25, 50, 75, 100)]
    if drawable(bar.value):
        fill = f"fill c{(bar.colour - 1) % COLOURS + 1}"
        parts.append(tag("rect", class_=fill, x="0", y="4", width=_inside(bar.value), height="12", rx="2"))
    if drawable(bar.low) and drawable(bar.high):
        low, high = _inside(bar.low), _inside(bar.high)
        parts.append(tag("line", class_="whisker", x1=low, x2=high, y1="10", y2="10"))
        parts += [tag("line", class_="whisker", x1=end, x2=end, y1="6", y2="14") for end in (low, high)]
    if drawable(bar.baseline):
        place = _inside(bar.baseline)
        parts.append(tag("line", class_="baseline", x1=place, x2=place, y1="0", y2="20"))
    return tag("svg", *parts, class_="bar", aria_hidden="true")


def _inside(place: float) -> str:
    return share(min(1.0, max(0.0, place)))


def _bar_text(bar: Bar) -> str:
    known = drawable(bar.low) and drawable(bar.high)
    interval = tag("small", f"{100 * bar.low:.1f}–{100 * bar.high:.1f}") if known else ""
    return f"{tag('b', percent(bar.value))} {interval}"
