"""Readers of markup that is not HTML: manual pages, Perl's POD, Metamath data bases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .readers import Document, decode, members
from .readers_binary import pages

COMMENT = '\\"'
ROFF_ESCAPES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\f(\[[^\]]*\]|\(..|.)|\\s[-+]?\d+|\\[&:%/,|^]|\\\".*|\\c$", ""),
        (r"\\\((aq|cq|oq)", "'"), (r"\\\((dq|lq|rq)", '"'), (r"\\\(bu", "*"), (r"\\\(em", "--"), (r"\\\(en|\\-", "-"),
        (r"\\\(co", "(c)"), (r"\\\(mu", "x"), (r"\\\(<=", "<="), (r"\\\(>=", ">="), (r"\\\(ha", "^"), (r"\\\(ti", "~"), (r"\\\(rs", r"\\"),
        (r"\\[~ 0]", " "), (r"\\\*\(..|\\\*\[[^\]]*\]|\\\*.|\\\(..|\\\[[^\]]*\]", ""), (r"\\e", r"\\"), (r"\\(.)", r"\1"),
    )
]  # fmt: skip
HEADINGS = ("SH", "SS", "Sh", "Ss")
BREAKS = ("PP", "LP", "P", "IP", "HP", "sp", "br", "Pp", "RS", "RE", "TP", "TQ")
FONTS = ("B", "I", "SM", "SB")
ALTERNATING_FONTS = ("BR", "BI", "RB", "IR", "RI", "IB")


def manual_pages(place: Path, pattern: str = r"(^|/)man\d/[^/]*\.\d\w*(\.gz)?$") -> Iterator[Document]:
    """Manual pages in the `man` macros, without their translations; a page that only includes another (`.so`) is left out."""
    for name, raw in members(place, pattern, skip=r"(^|/)man/[a-z]{2}([_@][^/]*)?/"):
        source = decode(raw)
        if not source.startswith(".so "):
            yield name, roff_to_text(source)


def roff_to_text(source: str) -> str:
    """Plain text of a page in the `man` macros (man(7)): lines filled into paragraphs; fonts, tables and unknown requests left out."""
    paragraphs: list[list[str]] = [[]]
    filled = [True]  # whether the lines of each paragraph are joined; examples keep theirs
    in_table = tag_follows = False

    def new_paragraph(fill: bool) -> None:
        paragraphs.append([])
        filled.append(fill)

    for line in source.splitlines():
        name, rest = ("", line) if line[:1] not in (".", "'") else (*line[1:].strip().split(None, 1), "", "")[:2]
        if name in ("TS", "TE"):
            in_table = name == "TS"
        if in_table or name in ("TE", "TH") or name.startswith(COMMENT):
            continue
        if name in ("nf", "EX", "fi", "EE"):
            new_paragraph(fill=name in ("fi", "EE"))
        elif name in HEADINGS or name in BREAKS:
            new_paragraph(fill=True)
        text = roff_text(name, rest)
        if text:
            paragraphs[-1].append(text)
        if name in HEADINGS or (tag_follows and text):
            new_paragraph(fill=True)
        tag_follows = name in ("TP", "TQ") or (tag_follows and not text)
    text = "\n\n".join((" " if fill else "\n").join(lines) for lines, fill in zip(paragraphs, filled, strict=True) if lines)
    for escape, replacement in ROFF_ESCAPES:
        text = escape.sub(replacement, text)
    return text


def roff_text(name: str, rest: str) -> str:
    """What a line prints: a plain line (no request name) itself, a request its arguments or nothing."""
    arguments = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', rest)]
    if not name:
        return rest
    if name in HEADINGS or name in FONTS:
        return " ".join(arguments)
    if name in ALTERNATING_FONTS:
        return "".join(arguments)
    return arguments[0] if name == "IP" and arguments else ""


def pod_files(place: Path, pattern: str = r"\.(pod|pm|pl)(\.gz)?$") -> Iterator[Document]:
    """The POD documentation (perlpod(1)) in Perl files, without the code around it."""
    for name, raw in members(place, pattern):
        blocks = re.findall(r"^=(?:pod|head\d|over|item|encoding)\b.*?(?=^=cut\b|\Z)", decode(raw), re.DOTALL | re.MULTILINE)
        yield name, pod_to_text("\n".join(blocks))


def pod_to_text(source: str) -> str:
    source = re.sub(r"^=begin\b.*?^=end\b", "", source, flags=re.DOTALL | re.MULTILINE)
    source = re.sub(r"^=(encoding|for|over|back|pod|cut)\b.*", "", source, flags=re.MULTILINE)
    source = re.sub(r"^=item\s*\*?\s*", "- ", source, flags=re.MULTILINE)
    source = re.sub(r"^=head\d\s*", "", source, flags=re.MULTILINE)
    source = re.sub(r"[XZ]<[^<>]*>", "", source)
    for _ in range(3):  # formatting codes nest
        source = re.sub(r"\b[BCFIS](?:<<+ (.*?) >>+|<([^<>]*)>)", lambda code: code[1] or code[2] or "", source)
        source = re.sub(r"\bL<(?:([^<>|]*)\|)?([^<>]*)>", lambda link: link[1] or link[2], source)
    source = source.replace("E<lt>", "<").replace("E<gt>", ">").replace("E<sol>", "/").replace("E<verbar>", "|")
    return re.sub(r"\n{3,}", "\n\n", source).strip()


# A comment, a labelled statement (hypothesis $e, variable's type $f, axiom $a, theorem $p with its proof), or an end of a scope.
METAMATH = re.compile(
    r"\$\((?P<comment>.*?)\$\)|(?P<scope>\$[{}])|(?P<label>[\w.-]+)\s+\$(?P<kind>[efap])\s(?P<math>.*?)(?:\$=(?P<proof>.*?))?\$\.",
    re.DOTALL,
)
# A long list of the lemmas that a proof uses is names without order.
MAX_LEMMAS = 16
CREDITS = re.compile(
    r"\(\s*(?:Contributed|Revised|Proof\s+shortened|Proof\s+modification|New\s+usage|Unnecessary|Proposed)\b[^()]*(?:\([^()]*\)[^()]*)*\)"
)


def metamath(place: Path, pattern: str = r"\.mm$", skip: str = r"(^|/)(big-unifier|demo0|miu)\.mm$") -> Iterator[Document]:
    """Metamath data bases: for each theorem and axiom its English comment, hypotheses, statement and what its proof uses.

    The letters of a compressed proof are left out: without the program that expands them they say nothing. So are superseded theorems,
    whose names end in OLD.
    """
    for name, raw in members(place, pattern, skip):
        yield from pages(name, metamath_statements(decode(raw)), characters=4_000)


def metamath_statements(source: str) -> Iterator[str]:
    comment = ""
    syntax: set[str] = set()  # labels that say what is well formed, not what is true
    hypotheses: list[list[str]] = [[]]  # one list a scope
    for match in METAMATH.finditer(source):
        if match["comment"] is not None:
            comment = match["comment"]
        elif match["scope"] == "${":
            hypotheses.append([])
        elif match["scope"] == "$}":
            hypotheses = hypotheses[:-1] or [[]]
        elif match["kind"] == "e":
            hypotheses[-1].append(" ".join(match["math"].split()))
        else:
            label, statement = match["label"], " ".join(match["math"].split())
            if not statement.startswith("|- "):
                syntax.add(label)
            elif not label.endswith("OLD"):
                lemmas = [name for name in metamath_lemmas(match["proof"] or "") if name not in syntax]
                title = f"{'Theorem' if match['kind'] == 'p' else 'Axiom'} {label}."
                yield metamath_entry(title, comment, [given for scope in hypotheses for given in scope], statement, lemmas)
            comment = ""


def metamath_lemmas(proof: str) -> list[str]:
    """The labels that a proof names: those in the brackets of a compressed proof, each of a plain one once."""
    compressed = re.match(r"\s*\(([^()]*)\)", proof)
    return [name for name in dict.fromkeys((compressed[1] if compressed else proof).split()) if name != "?"]


def metamath_entry(title: str, comment: str, hypotheses: list[str], statement: str, lemmas: list[str]) -> str:
    """One theorem or axiom as text."""
    comment = " ".join(CREDITS.sub("", comment).split()).replace("`", "").replace("~ ", "")
    lines = [f"{title} {comment}".rstrip()]
    lines += [f"Given {hypothesis}" for hypothesis in hypotheses]
    lines.append(f"{'Then ' if hypotheses else ''}{statement}")
    if lemmas:
        lines.append("Proof: " + " ".join(lemmas[:MAX_LEMMAS]) + (" ..." if len(lemmas) > MAX_LEMMAS else ""))
    return "\n".join(lines)
