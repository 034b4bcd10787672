"""Curves as a standalone SVG file, on the scales of the report's charts. Colours are its own: a file has no style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..report.page import tag
from ..report.scales import Scale, run_scale, value_scale
from ..report.words import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 48, 60  # margins around the plot
COLOURS = ("#0b62b0", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#0e7490", "#be185d", "#475569")
DASHES = ("none", "7 4", "2 3")  # a picture with more lines than colours, or without colours, can still be read
STYLE = """svg { background: #ffffff; font: 13px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #575c66; }
.title { font-size: 15px; font-weight: 600; fill: #1b1d21; } .grid { stroke: #e6e7e6; } .axis { stroke: #575c66; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }"""

Points = tuple[Sequence[float], Sequence[float]]  # x and y


def curves_picture(title: str, x_label: str, y_label: str, lines: Mapping[str, Points], zero: bool = True) -> str:
    """Lines with a dot at each point, named in a legend where there are several; both axes are linear, y starts at 0 if `zero`."""
    x_scale = run_scale([value for x, _ in lines.values() for value in x])
    y_scale = value_scale([value for _, y in lines.values() for value in y], zero=zero)
    shapes = [curve(number, x, y, x_scale, y_scale) for number, (x, y) in enumerate(lines.values())]
    return tag(
        "svg", tag("style", STYLE), tag("rect", width=WIDTH, height=HEIGHT, style="fill: #ffffff"),
        tag("text", escape(title), class_="title", x=LEFT, y=22), tag("text", escape(y_label), x=LEFT, y=40),
        tag("text", escape(x_label), x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 14, text_anchor="middle"),
        axes(x_scale, y_scale), *shapes, legend(list(lines)) if len(lines) > 1 else "",
        xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", width=WIDTH, height=HEIGHT, role="img", aria_label=title,
    ) + "\n"


def curve(number: int, x: Sequence[float], y: Sequence[float], x_scale: Scale, y_scale: Scale) -> str:
    """The line of that number and its dots, each with its values for the pointer."""
    places = [(across(x_scale, a), down(y_scale, b)) for a, b in zip(x, y, strict=True)]
    line = tag("path", class_="line", style=stroke(number), d="M" + "L".join(f"{right:.1f} {below:.1f}" for right, below in places))
    radius, fill = (3.5 if len(x) < 12 else 2), f"fill: {COLOURS[number % len(COLOURS)]}"
    dots = [tag("g", tag("title", f"{a:,.4g}: {b:,.4g}"), tag("circle", style=fill, cx=f"{right:.1f}", cy=f"{below:.1f}", r=radius))
            for (right, below), a, b in zip(places, x, y, strict=True)]
    return line + "".join(dots)


def legend(names: Sequence[str]) -> str:
    """A sample of each line and its name, in the upper right, which curves that fall leave free."""
    parts, right = [], WIDTH - RIGHT - 6
    for number, name in enumerate(names):
        y = TOP + 14 + 20 * number
        parts.append(tag("line", class_="line", style=stroke(number), x1=right - 30, x2=right, y1=y, y2=y))
        parts.append(tag("text", escape(name), x=right - 38, y=y, dy="0.32em", text_anchor="end"))
    return "".join(parts)


def stroke(number: int) -> str:
    """Colour and dashes of the line of that number."""
    return f"stroke: {COLOURS[number % len(COLOURS)]}; stroke-dasharray: {DASHES[number % len(DASHES)]}"


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
