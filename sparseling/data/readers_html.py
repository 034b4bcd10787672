"""HTML pages of documentation packages to plain text: the page's main content, without what is around it."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .readers import Document, decode, members, text_files

if TYPE_CHECKING:
    from lxml.etree import _Element

PAGES = r"\.x?html?(\.gz)?$"
INDEX_PAGES = r"(^|/)(search|genindex[^/]*|py-modindex|modindex|index-all)\.x?html?"
# Where documentation generators put the text, the most exact first.
MAIN_CONTENT = ("//main", "//div[@role='main']", "//article", "//*[@id='content']", "//body")
PARAGRAPHS = (
    "p", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul", "ol", "dl", "blockquote", "figure", "section", "article", "details",
)  # fmt: skip
LINES = ("div", "br", "dt", "dd", "tr", "hr", "caption", "figcaption", "title", "summary")
NO_TEXT = (
    "script", "style", "nav", "header", "footer", "noscript", "svg", "form", "button", "iframe", "template", "head", "aside", "select",
)  # fmt: skip
NAVIGATION = frozenset({
    "navheader", "navfooter", "sphinxsidebar", "related", "headerlink", "breadcrumb", "breadcrumbs", "sidebar", "t-navbar", "toc",
    "toctree-wrapper", "footer", "navigation", "copyright", "mw-jump", "editsection", "noprint", "printfooter", "catlinks", "memberdecls",
    "navset", "tocset", "navbar", "mw-editsection", "anchor-link",
})  # fmt: skip
# Private-use characters mark what survives the squeezing of white space.
LINE, PARAGRAPH, BULLET, CODE_NEWLINE, CODE_SPACE = "\ue000\ue001\ue002\ue003\ue004"
BREAKS = LINE + PARAGRAPH


def html_pages(place: Path, pattern: str = PAGES, skip: str = INDEX_PAGES) -> Iterator[Document]:
    """Each matching HTML page of a folder or archive as one document."""
    for name, raw in members(place, pattern, skip):
        yield name, html_to_text(raw)


def html_and_text(place: Path, skip: str, text_pattern: str) -> Iterator[Document]:
    """The HTML pages of a group of packages, then those of its text files that match."""
    yield from html_pages(place, skip=skip)
    yield from text_files(place, pattern=text_pattern)


def html_to_text(page: bytes | str) -> str:
    """The text of a page's main content: a line a block, a blank line between paragraphs, `- ` before list items.

    Preformatted text keeps its spaces and line ends. A page without any element gives "".
    """
    from lxml import etree

    text = page if isinstance(page, str) else decode(page)
    # lxml refuses a str that declares its own encoding; it has been decoded, so the declaration means nothing any more.
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    for mark in BREAKS + BULLET + CODE_SPACE + CODE_NEWLINE:
        text = text.replace(mark, "")
    try:
        root = etree.fromstring(text, etree.HTMLParser())
    except (etree.LxmlError, ValueError):
        return ""
    if root is None:
        return ""
    found = (hits[0] for path in MAIN_CONTENT if (hits := root.xpath(path)))
    content = next(found, root)
    etree.strip_elements(content, etree.Comment, etree.ProcessingInstruction, *NO_TEXT, with_tail=False)
    _mark_blocks(content)
    return _unmark("".join(content.itertext()))


def _mark_blocks(content: _Element) -> None:
    """Write marks into the tree's text where lines, paragraphs and list items begin and end; take navigation out."""
    for code in content.iter("pre"):
        text = "".join(code.itertext()).expandtabs().strip("\n")
        for child in list(code):
            code.remove(child)
        code.text = text.replace(" ", CODE_SPACE).replace("\n", CODE_NEWLINE)
    for element in content.xpath(".//*[@class or @id]"):
        if _is_navigation(element.get("class"), element.get("id")) and element is not content:
            _remove(element)
    for tags, mark in ((LINES, LINE), (PARAGRAPHS, PARAGRAPH)):
        for element in content.iter(*tags):
            _surround(element, mark, mark)
    for element in content.iter("li"):
        _surround(element, BULLET, LINE)
    for element in content.iter("td", "th"):
        _surround(element, "", " ")
    for element in content.iter("img"):
        if "math" in (element.get("class") or ""):
            element.text = element.get("alt")


def _surround(element: _Element, before: str, after: str) -> None:
    element.text = before + (element.text or "")
    element.tail = after + (element.tail or "")


@functools.lru_cache(maxsize=10_000)
def _is_navigation(classes: str | None, identity: str | None) -> bool:
    """Whether a whole class name or the id says that this is furniture of the page (`toc` must not match `protocol`)."""
    return bool(classes and not NAVIGATION.isdisjoint(classes.lower().split())) or (identity or "").lower() in NAVIGATION


def _remove(element: _Element) -> None:
    """Take an element out, but not the text that follows it."""
    parent, previous = element.getparent(), element.getprevious()
    if element.tail:
        if previous is not None:
            previous.tail = (previous.tail or "") + element.tail
        else:
            parent.text = (parent.text or "") + element.tail
    parent.remove(element)


def _unmark(text: str) -> str:
    """White space as a browser shows it (any run is one space), then the marks as line ends and bullets."""
    text = " ".join(text.split())
    for mark in BREAKS + BULLET:
        text = text.replace(" " + mark, mark)
    text = re.sub(f"{BULLET}[ {BREAKS}]*", f"{LINE}{BULLET}", text)
    text = re.sub(f"[{BREAKS}][ {BREAKS}]*", lambda run: "\n\n" if PARAGRAPH in run[0] else "\n", text)
    return text.replace(BULLET, "- ").replace(CODE_SPACE, " ").replace(CODE_NEWLINE, "\n").strip()


def strip_tags(fragment: str) -> str:
    """The text of a short HTML fragment; text without markup is returned as it is."""
    if "<" not in fragment:
        return html.unescape(fragment)
    return html_to_text(f"<body>{fragment}</body>")
