"""`write_report`: a run folder in, one self-contained page out."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from ..files import write_aside
from ..progress import track
from .collect import Run, collect
from .page import tag
from .results import accuracy_section, headline_section, merge_section, recipe_section, samples_section, sources_section, stages_section
from .training import balance_section, gradient_section, loss_section, routing_section, speed_section, validation_section
from .words import duration, escape

# (anchor, heading, what writes it), in the order of the page
SECTIONS: tuple[tuple[str, str, Callable[[Run], str]], ...] = (
    ("headline", "Headline", headline_section),
    ("loss", "Loss", loss_section),
    ("validation", "Validation bits per byte by domain", validation_section),
    ("accuracy", "Accuracy", accuracy_section),
    ("samples", "Sample answers", samples_section),
    ("balance", "Expert load balance", balance_section),
    ("routing", "Routing", routing_section),
    ("merge", "Merged against last checkpoint", merge_section),
    ("gradients", "Gradients and learning rate", gradient_section),
    ("speed", "Speed", speed_section),
    ("stages", "Stages and machine", stages_section),
    ("sources", "Data sources", sources_section),
    ("recipe", "Recipe", recipe_section),
)


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder from the files that are there, finished or not; returns its path.

    The page needs nothing else: styles, pictures and its few lines of script are inside it, and its content policy forbids the network.

    Raises:
        UserError: there is no such folder, or the disk is full.
    """
    path = Path(run_folder) / "report.html"
    page = render(collect(Path(run_folder)))
    with write_aside(path) as stream:
        stream.write(page)
    return path


def render(run: Run) -> str:
    """The page for a run: HTML that is well-formed XML too."""
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("style.css", "hover.js"))
    script = f"//<![CDATA[\n{script}\n//]]>"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"), tag("meta", name="color-scheme", content="light dark"),
        tag("title", escape(f"{run.name}: sparseling run report")), f"<style>\n{style}</style>",
    )
    links = (tag("li", tag("a", escape(title), href=f"#{anchor}")) for anchor, title, _ in SECTIONS[1:])
    header = tag("header", tag("h1", escape(run.name)), tag("p", escape(_state(run)), class_="state"), _notes(run))
    navigation = tag("nav", tag("ul", *links), aria_label="Sections")
    sections = [
        tag("section", tag("h2", escape(title), id=f"{anchor}-title"), write(run), id=anchor, aria_labelledby=f"{anchor}-title")
        for anchor, title, write in track(SECTIONS, "writing the report", total=len(SECTIONS))
    ]
    body = tag("body", header, navigation, tag("main", *sections), f"<script>{script}</script>")
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _state(run: Run) -> str:
    done = sum(stage.finished for stage in run.stages)
    if run.stages and done == len(run.stages):
        return f"Finished: {done} stages in {duration(run.summary.seconds_total)}."
    return f"Not finished: {done} of {len(run.stages)} stages are done; what is there so far is shown."


def _notes(run: Run) -> str:
    return tag("ul", *(tag("li", escape(note)) for note in run.notes), class_="notes") if run.notes else ""
