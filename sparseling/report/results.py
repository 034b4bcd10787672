"""The report's sections about what came out: headline figures, merging, accuracy, answers, and what the run was made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .bars import Bar, Change, change_bars, interval_bars, length_bars
from .charts import swatch
from .collect import Run, Stage
from .page import details, figure, missing, paragraph, side_by_side, table, tag
from .summary import Merge, Sample, Score, Scores, Summary
from .words import MISSING, NARROW, bits, clip, count, duration, escape, file_size, label, number, percent, signed

MODES = {"on": "thinking on", "off": "thinking off"}
LONGEST_TEXT_CHARACTERS = 4000
OPEN_THINKING_CHARACTERS = 400
MOST_SAMPLES = 80


def headline_section(run: Run) -> str:
    """Cards with the run's main figures; a dash where one is not known yet."""
    summary = run.summary
    cards = [
        ("Time in total", duration(summary.seconds_total), _longest_stage(run)),
        ("Parameters", count(summary.parameters_total), _active(summary)),
        ("Tokens trained", count(summary.tokens_trained), _tokens_a_parameter(summary)),
        *_bits_cards(summary),
        *_addition_cards(summary.accuracy),
        ("Merge gain", signed(summary.merge_gain), "bits per byte saved by merging, mean over domains; above 0 the merged model is better"),
    ]
    return tag("dl", *(_card(*card) for card in cards), class_="cards")


def merge_section(run: Run) -> str:
    merges = [merge for merge in run.summary.merges if set(merge.last) & set(merge.merged)]
    if not merges:
        return missing("No merge has been measured yet: the merge stage compares its result with the last checkpoint (summary.json).")
    return side_by_side(*(_merge_figure(merge) for merge in merges))


def accuracy_section(run: Run) -> str:
    """Bars by task, a bar for every stage and mode that was evaluated."""
    stages = dict(run.summary.accuracy_by_stage)
    if run.summary.accuracy and run.summary.accuracy not in stages.values():
        stages["final"] = run.summary.accuracy
    stages = {stage: scores for stage, scores in stages.items() if scores}
    if not stages:
        return missing("Nothing has been evaluated yet: the eval stage asks held-out prompts in both modes (accuracy in summary.json).")
    tasks = list(dict.fromkeys(task for scores in stages.values() for task in scores))
    groups, rows = [], []
    for task in tasks:
        entries = [(stage, mode, score) for stage, scores in stages.items() for mode, score in _in_order(scores.get(task, {}))]
        groups.append((label(task), [_score_bar(stage if len(stages) > 1 else "", mode, score) for stage, mode, score in entries]))
        rows += [_score_row(task, stage, mode, score) for stage, mode, score in entries]
    data = table(["task", "stage", "mode", "accuracy", f"95{NARROW}% interval", "prompts", "constant answer"], rows, numbers_from=3)
    text = f"Exact match on prompts that were never trained on, with 95{NARROW}% intervals."
    return figure("Exact-match accuracy by task", text, _mode_legend(stages) + interval_bars("Accuracy by task", groups), data)


def samples_section(run: Run) -> str:
    samples = run.summary.samples
    if not samples:
        return missing("There are no sample answers yet: the eval stage keeps some (samples in summary.json).")
    right = sum(sample.correct for sample in samples)
    shown = samples[:MOST_SAMPLES]
    part = f"; the first {len(shown)} are shown" if len(shown) < len(samples) else ""
    cards = tag("div", *(_sample_card(sample) for sample in shown), class_="samples")
    return paragraph(f"{right:,} of {len(samples):,} kept answers are right{part}.") + cards


def recipe_section(run: Run) -> str:
    if not run.recipe:
        return missing("The run folder has no recipe.yaml.")
    return details("The recipe with every key resolved (recipe.yaml)", tag("pre", escape(clip(run.recipe, 200_000)), tabindex="0"))


def sources_section(run: Run) -> str:
    if not run.sources:
        return missing("No manifest of data sources was found: the data stage writes one with each source's licence.")
    head = ["source", "licence", "domain", "package or file", "left out", "documents", "text"]
    rows = []
    for item in run.sources:
        words = [item.domain or MISSING, clip(item.origin, 160) or MISSING, item.dropped or MISSING]
        rows.append([item.name, item.licence, *words, _whole(item.documents), file_size(item.bytes)])
    skipped = [tag("li", escape(f"{name} could not be had: {clip(reason, 200)}")) for name, reason in run.skipped_sources.items()]
    return table(head, rows, numbers_from=5) + (tag("ul", *skipped, class_="skipped") if skipped else "")


def stages_section(run: Run) -> str:
    """Machine, and the time of each stage."""
    parts = []
    if run.stages:
        lengths = [(stage.name, stage.seconds, _time(stage)) for stage in run.stages]
        total = math.fsum(stage.seconds for stage in run.stages if math.isfinite(stage.seconds))
        rows = []
        for stage in run.stages:
            words = [stage.name, stage.kind or MISSING, _state(stage)]
            rows.append([*words, duration(stage.seconds), _part(stage.seconds, total), stage.hash[:12]])
        data = table(["stage", "kind", "state", "time", "share", "hash of inputs"], rows, numbers_from=3)
        parts.append(figure("Time of each stage", "", length_bars("Time of each stage", lengths), data))
    else:
        parts.append(missing("No stage has started yet."))
    if run.summary.machine:
        facts = run.summary.machine.items()
        pairs = (tag("div", tag("dt", escape(label(name))), tag("dd", escape(clip(value, 400)))) for name, value in facts)
        parts.append(tag("h3", "Machine") + tag("dl", *pairs, class_="facts"))
    else:
        parts.append(missing("The machine is not described yet (machine.json)."))
    return "".join(parts)


def _state(stage: Stage) -> str:
    return "done" if stage.finished else "begun" if stage.begun else "to come"


def _time(stage: Stage) -> str:
    if stage.finished:
        return duration(stage.seconds)
    return f"{_state(stage)}, {duration(stage.seconds)} so far" if math.isfinite(stage.seconds) else _state(stage)


def _card(title: str, value: str, note: str) -> str:
    return tag("div", tag("dt", escape(title)), tag("dd", tag("strong", escape(value)), tag("span", escape(note))), class_="card")


def _longest_stage(run: Run) -> str:
    timed = [stage for stage in run.stages if math.isfinite(stage.seconds)]
    if not timed:
        return "not finished"
    longest = max(timed, key=lambda stage: stage.seconds)
    return f"longest stage: {longest.name}, {duration(longest.seconds)}"


def _active(summary: Summary) -> str:
    if not (summary.parameters_active > 0 and summary.parameters_total > 0):
        return "active per token: not known"
    return f"{count(summary.parameters_active)} active per token ({percent(summary.parameters_active / summary.parameters_total, 0)})"


def _tokens_a_parameter(summary: Summary) -> str:
    if not (summary.parameters_active > 0 and math.isfinite(summary.tokens_trained)):
        return "not known yet"
    return f"{number(summary.tokens_trained / summary.parameters_active, 2)} tokens per active parameter"


def _bits_cards(summary: Summary) -> list[tuple[str, str, str]]:
    """Bits per byte of prose (or of the first domain there is) against each baseline on the same text."""
    reached = summary.validation_bits_per_byte
    domain = "prose" if "prose" in reached else next(iter(reached), "")
    if not domain:
        return [("Bits per byte", MISSING, "not validated yet")]
    baselines = {name: values[domain] for name, values in summary.baseline_bits_per_byte.items() if values.get(domain, 0) > 0}
    notes = [f"{_below(reached[domain] / value)} {label(name)} ({bits(value)})" for name, value in baselines.items()]
    return [(f"Bits per byte, {domain}", bits(reached[domain]), "; ".join(notes[:3]) or "no baseline measured")]


def _below(ratio: float) -> str:
    return f"{percent(1 - ratio)} below" if ratio <= 1 else f"{percent(ratio - 1)} above"


def _addition_cards(accuracy: Scores) -> list[tuple[str, str, str]]:
    task = next((name for name in accuracy if "addition" in name), "addition")
    cards = []
    for mode, name in MODES.items():
        score = accuracy.get(task, {}).get(mode)
        note = _score_note(score) if score else "not evaluated yet"
        cards.append((f"{label(task).capitalize()}, {name}", percent(score.accuracy) if score else MISSING, note))
    return cards


def _score_note(score: Score) -> str:
    parts = [f"95{NARROW}% interval {_interval(score)}"] if math.isfinite(score.low) and math.isfinite(score.high) else []
    parts += [f"{_whole(score.samples)} unseen prompts"] if math.isfinite(score.samples) else []
    parts += [f"best constant answer {percent(score.constant_baseline)}"] if math.isfinite(score.constant_baseline) else []
    return "; ".join(parts)


def _merge_figure(merge: Merge) -> str:
    changes = [Change(domain, merge.last[domain], merge.merged[domain]) for domain in merge.last if domain in merge.merged]
    mean = math.fsum(change.after - change.before for change in changes) / len(changes)
    text = (
        "Validation bits per byte of the last checkpoint → of the merged one; lower is better. "
        f"In the mean over the domains, merging changes it by {signed(mean)}."
    )
    rows = [[change.label, bits(change.before), bits(change.after), signed(change.after - change.before)] for change in changes]
    data = table(["domain", "last checkpoint", "merged", "difference"], rows)
    picture = change_bars("Change in bits per byte from the last checkpoint to the merged one", changes)
    return figure(f"{merge.stage}: checkpoints of {merge.of}" if merge.of else merge.stage, text, picture, data)


def _score_bar(stage: str, mode: str, score: Score) -> Bar:
    name = MODES.get(mode, mode)
    return Bar(f"{stage} · {name}" if stage else name, score.accuracy, score.low, score.high, score.constant_baseline, _mode_colour(mode))


def _in_order(scores: Mapping[str, Score]) -> list[tuple[str, Score]]:
    """Thinking on, thinking off, then whatever else there is."""
    return sorted(scores.items(), key=lambda item: [*MODES, item[0]].index(item[0]))


def _mode_colour(mode: str) -> int:
    return {"on": 1, "off": 2}.get(mode, 3)


def _mode_legend(stages: Mapping[str, Scores]) -> str:
    modes = list(dict.fromkeys(mode for scores in stages.values() for found in scores.values() for mode, _ in _in_order(found)))
    fills = [(mode, tag("rect", class_=f"fill c{_mode_colour(mode)}", width="26", height="10")) for mode in modes]
    items = [tag("li", swatch(fill), escape(MODES.get(mode, mode))) for mode, fill in fills]
    items.append(tag("li", swatch(tag("line", class_="whisker", x1="1", x2="25", y1="5", y2="5")), f"95{NARROW}% interval"))
    items.append(tag("li", swatch(tag("line", class_="baseline", x1="13", x2="13", y1="0", y2="10")), "best constant answer"))
    return tag("ul", *items, class_="legend")


def _score_row(task: str, stage: str, mode: str, score: Score) -> Sequence[str]:
    figures = (percent(score.accuracy), _interval(score), _whole(score.samples), percent(score.constant_baseline))
    return [label(task), stage, MODES.get(mode, mode), *figures]


def _interval(score: Score) -> str:
    known = math.isfinite(score.low) and math.isfinite(score.high)
    return f"{100 * score.low:.1f}–{100 * score.high:.1f}" if known else MISSING


def _sample_card(sample: Sample) -> str:
    verdict = tag("span", "✓ right" if sample.correct else "✗ wrong", class_="verdict")
    head = tag("h3", verdict, escape(f" {label(sample.task)}, {MODES.get(sample.mode, sample.mode)}"))
    short = len(sample.thinking) <= OPEN_THINKING_CHARACTERS
    thinking = [details("Thinking", _quoted(sample.thinking), opened=short)] if sample.thinking else []
    answer = [tag("h4", "Answer"), _quoted(sample.answer or "(no answer)"), tag("h4", "Expected"), _quoted(sample.expected)]
    kind = "sample right" if sample.correct else "sample wrong"
    return tag("article", head, tag("h4", "Prompt"), _quoted(sample.prompt), *thinking, *answer, class_=kind)


def _quoted(text: str) -> str:
    return tag("pre", escape(clip(text, LONGEST_TEXT_CHARACTERS)))


def _whole(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else MISSING


def _part(seconds: float, total: float) -> str:
    return percent(seconds / total, 0) if math.isfinite(seconds) and total > 0 else MISSING
