"""One curve as a standalone SVG file, on the scales of the report's charts. Colours are its own: a file has no style sheet."""

from __future__ import annotations

from collections.abc import Sequence

from ..report.page import tag
from ..report.scales import Scale, run_scale, value_scale
from ..report.words import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 48, 60  # margins around the plot
STYLE = """svg { background: #ffffff; font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #575c66; }
.title { font-size: 15px; font-weight: 600; fill: #1b1d21; } .grid { stroke: #e6e7e6; } .axis { stroke: #575c66; }
.line { fill: none; stroke: #0b62b0; stroke-width: 2; stroke-linejoin: round; } .dot { fill: #0b62b0; }"""


def curve_picture(title: str, x_label: str, y_label: str, x: Sequence[float], y: Sequence[float]) -> str:
    """A line with a dot at each point; both axes are linear and start at 0."""
    x_scale, y_scale = run_scale(x), value_scale(y, zero=True)
    places = [(across(x_scale, a), down(y_scale, b)) for a, b in zip(x, y, strict=True)]
    line = tag("path", class_="line", d="M" + "L".join(f"{right:.1f} {below:.1f}" for right, below in places))
    dots = [tag("g", tag("title", f"{a:,.0f}: {b:,.1f}"), tag("circle", class_="dot", cx=f"{right:.1f}", cy=f"{below:.1f}", r=3.5))
            for (right, below), a, b in zip(places, x, y, strict=True)]
    return tag(
        "svg", tag("style", STYLE), tag("rect", width=WIDTH, height=HEIGHT, style="fill: #ffffff"),
        tag("text", escape(title), class_="title", x=LEFT, y=22), tag("text", escape(y_label), x=LEFT, y=40),
        tag("text", escape(x_label), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 14, text_anchor="middle"),
        axes(x_scale, y_scale), line, *dots,
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, height=HEIGHT, role="img", aria_label=title,
    ) + "\n"


def across(scale: Scale, value: float) -> float:
    """Where a value of the x axis stands, in pixels from the left."""
    return LEFT + (WIDTH - LEFT - RIGHT) * scale.place(value)


def down(scale: Scale, value: float) -> float:
    """Where a value of the y axis stands, in pixels from the top."""
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * scale.place(value)


def axes(x_scale: Scale, y_scale: Scale) -> str:
    """Grid lines and labels of both axes, and the base line."""
    parts = []
    for tick, text in zip(y_scale.ticks, y_scale.labels, strict=True):
        y = f"{down(y_scale, tick):.1f}"
        parts.append(tag("line", class_="grid" if tick else "axis", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        parts.append(tag("text", escape(text), x=LEFT - 8, y=y, dy="0.32em", text_anchor="end"))
    for tick, text in zip(x_scale.ticks, x_scale.labels, strict=True):
        parts.append(tag("text", escape(text), x=f"{across(x_scale, tick):.1f}", y=HEIGHT - BOTTOM + 20, text_anchor="middle"))
    return "".join(parts)
