"""The whole page: well-formed, self-contained, safe, honest about what is missing, and never too large."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from sparseling.report.build import SECTIONS, render, write_report
from sparseling.report.collect import Run, Stage, collect
from sparseling.report.metrics import SCALARS, ExpertLoad, StageMetrics, Validation
from sparseling.report.summary import Summary
from sparseling.report.training import timeline

ATTACK = '</script><script>alert(1)</script><img src="http://evil.example/x" onerror="alert(2)">'


def page_of(folder: Path) -> ElementTree.Element:
    return ElementTree.fromstring(write_report(folder).read_text(encoding="utf-8"))


def words_of(page: ElementTree.Element, anchor: str) -> str:
    section = next(element for element in page.iter("section") if element.get("id") == anchor)
    return re.sub(r"[\s\u00a0\u202f]+", " ", " ".join(section.itertext()))


class Tags(HTMLParser):
    """Every start tag as a browser's own parser sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_a_finished_run_fills_every_section(run_folder: Path) -> None:
    page = page_of(run_folder)
    assert [element.get("id") for element in page.iter("section")] == [anchor for anchor, _, _ in SECTIONS]
    assert not [element for element in page.iter() if element.get("class") == "missing"]
    assert "Finished: 6 stages in 14\u00a0min\u00a030\u00a0s." in "".join(page.itertext())
    headline = words_of(page, "headline")
    figures = ["14 min 30 s", "4.21 M", "1.5 M active per token (36 %)", "9.4 M", "2.050", "26.9 % below order-2 byte model (2.806)"]
    assert [figure for figure in figures if figure not in headline] == [] and "+0.0214" in headline
    accuracy = json.loads((run_folder / "summary.json").read_text())["accuracy"]["two_digit_addition"]
    for mode in ("on", "off"):
        assert f"Two digit addition, thinking {mode} {accuracy[mode]['accuracy']:.1%}".replace("%", " %") in headline
        assert f"{100 * accuracy[mode]['low']:.1f}–{100 * accuracy[mode]['high']:.1f}" in headline
    assert "midtrain 2.081 1.921" in words_of(page, "validation")
    assert words_of(page, "accuracy").index("sft · thinking on") < words_of(page, "accuracy").index("sft · thinking off")
    assert "skipped step (4 of 1,170)" in words_of(page, "gradients")
    assert "GPL-2.0" in words_of(page, "sources") and "1-sqrt" in words_of(page, "recipe")
    assert "Example CPU" in words_of(page, "stages") and "6 min 51 s" in words_of(page, "stages")
    assert "4 of 6 kept answers are right" in words_of(page, "samples") and "The step is 4." in words_of(page, "samples")


def test_every_picture_has_a_name_and_every_figure_a_title(run_folder: Path) -> None:
    page = page_of(run_folder)
    pictures = [element for element in page.iter("svg") if element.get("role") == "img"]
    assert len(pictures) >= 15 and all(element.get("aria-label") for element in pictures)
    covered = [element for element in page.iter() if element.get("aria-hidden") or element.get("role") == "img"]
    inside = {inner for element in covered for inner in element.iter("svg")}
    assert set(page.iter("svg")) == inside, "an svg that is neither named nor hidden from screen readers"
    for figure in page.iter("figure"):
        assert "".join(next(figure.iter("h3")).itertext()).strip()
        if any(element.get("role") == "img" for element in figure.iter("svg")):
            assert list(figure.iter("details")) and list(figure.iter("table"))


def test_the_page_needs_nothing_from_outside(run_folder: Path) -> None:
    page = page_of(run_folder)
    text = (run_folder / "report.html").read_text(encoding="utf-8")
    for element in page.iter():
        assert element.tag not in {"link", "img", "iframe", "object", "embed", "image", "use", "base", "form"}
        for name, value in element.attrib.items():
            if name in {"src", "href", "action", "data", "poster", "srcset"}:
                assert value.startswith("#"), f"{element.tag} {name}={value}"
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", text)
    policy = next(element.get("content", "") for element in page.iter("meta") if element.get("http-equiv"))
    script = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}';" in policy
    anchors = {element.get("id") for element in page.iter()}
    assert all(link.get("href", "")[1:] in anchors for link in page.iter("a"))


def test_hostile_content_stays_text(run_folder: Path) -> None:
    raw = json.loads((run_folder / "summary.json").read_text())
    raw["samples"] = [{name: ATTACK for name in ("task", "mode", "prompt", "answer", "expected")}]
    raw["samples"][0]["answer"] = f"<think>{ATTACK}\x00\ud800</think>{ATTACK}"
    raw["machine"] = {ATTACK: ATTACK}
    raw["accuracy"][ATTACK] = {ATTACK: raw["accuracy"]["maximum"]["on"]}
    raw["validation_bits_per_byte"][ATTACK] = 2.0
    raw["baseline_bits_per_byte"][ATTACK] = {ATTACK: 3.0, "prose": 3.0}
    raw["merge"][ATTACK] = {"last": {ATTACK: 2.0}, "merged": {ATTACK: 1.9}}
    (run_folder / "summary.json").write_text(json.dumps(raw))
    (run_folder / "recipe.yaml").write_text((run_folder / "recipe.yaml").read_text() + f"note: '{ATTACK}'\n")
    (run_folder / "data/documents/manifest.json").write_text(json.dumps({ATTACK: {"licence": ATTACK, "dropped": ATTACK}}))
    page = page_of(run_folder)
    assert ATTACK in " ".join(page.itertext())
    tags = Tags()
    tags.feed((run_folder / "report.html").read_text(encoding="utf-8"))
    names = [name for name, _ in tags.found]
    assert names.count("script") == 1 and "img" not in names
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    lines = [element for element in page.iter() if element.get("class") == "missing"]
    assert len(lines) >= len(SECTIONS) - 1 and all(len(line.text or "") > 20 for line in lines)
    assert "Not finished" in "".join(page.itertext())


@pytest.mark.parametrize("finished", range(6))
def test_an_unfinished_run_shows_what_is_there(run_folder: Path, finished: int) -> None:
    names = ["data", "pretrain", "midtrain", "merge", "sft", "eval"]
    (run_folder / "summary.json").unlink()
    for name in names[finished:]:
        (run_folder / name / "done.json").unlink()
        (run_folder / name / "metrics.jsonl").unlink(missing_ok=True)
    page = page_of(run_folder)
    assert f"Not finished: {finished} of 6 stages are done" in "".join(page.itertext())
    assert ("No stage has logged" in words_of(page, "loss")) == (finished < 2)
    assert "Nothing has been evaluated yet" in words_of(page, "accuracy")


def test_a_log_cut_anywhere_still_gives_a_page(tmp_path: Path, stage_lines: Callable[..., list[dict[str, Any]]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in stage_lines(5, 4, 100, (5.0, 3.0), layers=2, experts=3)).encode()
    (tmp_path / "pretrain").mkdir()
    for cut in random.Random(0).sample(range(len(text)), 12):
        (tmp_path / "pretrain/metrics.jsonl").write_bytes(text[:cut])
        page_of(tmp_path)


def test_any_junk_in_the_summary_still_gives_a_page(run_folder: Path) -> None:
    """Replace random parts of the summary by values of other kinds: a page each time."""
    chance = random.Random(3)
    junk: list[Any] = [None, True, -1, 0, 1e308, math.nan, math.inf, "", "x", [], [1], {}, {"a": {"b": [None]}}, 10**400]
    original = json.loads((run_folder / "summary.json").read_text())
    for name in ("pretrain", "midtrain", "sft"):
        lines = (run_folder / name / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run_folder / name / "metrics.jsonl").write_text("".join(lines[:8]))

    def spoil(value: Any) -> Any:
        if chance.random() < 0.07:
            return chance.choice(junk)
        if isinstance(value, dict):
            return {key: spoil(item) for key, item in value.items()}
        return [spoil(item) for item in value] if isinstance(value, list) else value

    for _ in range(12):
        (run_folder / "summary.json").write_text(json.dumps({key: spoil(item) for key, item in original.items()}))
        page_of(run_folder)


def test_any_junk_in_the_metrics_still_gives_a_page(tmp_path: Path, stage_lines: Callable[..., list[dict[str, Any]]]) -> None:
    chance = random.Random(4)
    numbers: list[Any] = [None, True, -1, 0, 1e308, -1e308, math.nan, math.inf, -math.inf]
    junk = [*numbers, "x", [], [1], [[]], [[1e308, -1e308]], {"a": None}, {}]
    for seed in range(12):
        lines = stage_lines(seed, 12, 100, (5.0, 3.0), layers=3, experts=4, skipped=(3,))
        for line in lines:
            for key in line:
                if chance.random() < 0.15:
                    line[key] = chance.choice(junk)
        for name, part in (("a", lines[:8]), ("b", lines[8:])):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
        page_of(tmp_path)


def test_stages_stand_one_after_the_other(run_folder: Path) -> None:
    spans = timeline(collect(run_folder))
    ends = [float(span.x[-1]) for span in spans]
    assert [span.name for span in spans] == ["pretrain", "midtrain", "sft"]
    assert [span.start for span in spans] == [0.0, ends[0], ends[1]]
    lengths = [float(span.metrics.scalars["tokens"][-1]) for span in spans]
    np.testing.assert_allclose(ends, np.cumsum(lengths))


def test_a_stage_that_goes_on_counting_is_not_moved(tmp_path: Path, stage_lines: Callable[..., list[dict[str, Any]]]) -> None:
    first, second = stage_lines(1, 10, 100, (5.0, 3.0)), stage_lines(2, 10, 100, (3.0, 2.0))
    for line in second:
        line["tokens"] += 10_000
    for name, lines in (("a", first), ("b", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spans = timeline(collect(tmp_path))
    np.testing.assert_array_equal(spans[1].x, spans[1].metrics.scalars["tokens"])
    (tmp_path / "b/done.json").write_text(json.dumps({"stage": "b", "kind": "sft", "seconds": 1.0, "outputs": {}}))
    assert [span.name for span in timeline(collect(tmp_path), without="sft")] == ["a"]


def long_run(steps: int, layers: int, experts: int) -> Run:
    """A run with every figure logged at every step, as arrays."""
    chance = np.random.default_rng(0)
    index = np.arange(1, steps + 1)
    scalars = {name: chance.normal(5, 1, steps) for name in SCALARS}
    scalars |= {"tokens": index * 4e6, "skipped": (chance.random(steps) < 0.001) * 1.0}
    names = ("max_violation", "min_violation", "load_entropy")
    layered = {name: chance.random((steps, layers), dtype=np.float32) for name in names}
    checks = tuple(Validation(int(step), step * 4e6, {name: float(chance.normal()) for name in "abcdef"}) for step in index[::50])
    loads = [ExpertLoad(step, step * 4e6, chance.dirichlet(np.ones(experts), layers)) for step in (1, steps)]
    metrics = StageMetrics(index, scalars, layered, checks, *loads)
    stage = Stage("pretrain", "pretrain", True, True, 1.0, "", {}, metrics)
    return Run("large", (stage,), Summary(), "", (), {}, tuple(str(layer) for layer in range(layers)), ())


def test_the_largest_run_stays_under_three_megabytes() -> None:
    page = render(long_run(steps=100_000, layers=80, experts=256))
    assert len(page.encode()) < 3_000_000
    ElementTree.fromstring(page)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_told_from_the_ground_in_light_and_dark() -> None:
    """WCAG 2.1: text 4.5 to 1 (1.4.3), lines and bars 3 to 1 (1.4.11)."""
    style = files("sparseling.report").joinpath("style.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--([a-z]+\d?): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(themes) == 2 and themes[0].keys() == themes[1].keys()
    for theme in themes:
        for text in ("ink", "soft", "link", "good", "bad"):
            assert min(contrast(theme[text], theme[ground]) for ground in ("page", "card")) >= 4.5, text
        assert contrast(theme["ink"], theme["code"]) >= 4.5
        for line in range(1, 9):
            assert contrast(theme[f"c{line}"], theme["card"]) >= 3, f"c{line}"
        for ramp in ("q", "v"):
            steps = [luminance(theme[f"{ramp}{index}"]) for index in range(9)]
            halves = [steps] if ramp == "q" else [steps[:5], steps[4:]]
            for half in halves:  # lightness alone must give the order, for those who see no hue
                assert half in (sorted(half), sorted(half, reverse=True))
