"""HTML as well-formed strings: tags, tables, figures. Content that is not ours goes through `words.escape` on its way in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .words import escape

_VOID = {"line", "rect", "circle", "path", "polygon", "meta", "br"}


def tag(name: str, /, *children: str, **attributes: object) -> str:
    """One element. `children` are finished HTML; attribute values are escaped, None leaves one out, `class_` is `class`, `_` is `-`."""
    parts = [f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items() if value is not None]
    opening = f"<{name}{''.join(parts)}"
    return f"{opening}/>" if name in _VOID else f"{opening}>{''.join(children)}</{name}>"


def missing(text: str) -> str:
    """The one line that stands where there is nothing to show yet."""
    return tag("p", escape(text), class_="missing")


def paragraph(text: str) -> str:
    return tag("p", escape(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers_from: int = 1) -> str:
    """A table of plain text; columns from `numbers_from` on are aligned as numbers, the first cell of a row heads it."""
    def kind(column: int) -> str | None:
        return "figure" if column >= numbers_from else None

    top = "".join(tag("th", escape(cell), scope="col", class_=kind(column)) for column, cell in enumerate(head))
    body = []
    for row in rows:
        first = tag("th", escape(row[0]), scope="row")
        body.append(tag("tr", first, *(tag("td", escape(cell), class_=kind(column)) for column, cell in enumerate(row[1:], start=1))))
    return tag("div", tag("table", tag("thead", tag("tr", top)), tag("tbody", *body)), class_="scroll", tabindex="0")


def details(summary: str, *content: str, opened: bool = False) -> str:
    """Content behind a line that opens it."""
    return tag("details", tag("summary", escape(summary)), *content, open="open" if opened else None)


def figure(title: str, text: str, picture: str, data: str = "") -> str:
    """A picture under its title and explanation, with its numbers as a table behind a line."""
    caption = tag("figcaption", tag("h3", escape(title)), paragraph(text) if text else "")
    return tag("figure", caption, picture, details("Data table", data) if data else "")


def side_by_side(*figures: str) -> str:
    """Figures in as many columns as the window has room for."""
    return tag("div", *figures, class_="panels")
