"""A race: models of several sizes train on the same text for the same time, and validation bits per byte are drawn against the time.

They take turns in short slices, so that a busy machine slows all of them alike. What is validated is the mean of the weights over the
last part of the time gone (merging stands for learning-rate decay), so a point of a curve is about what a run of that length would give.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accounting import count_parameters
from ..checkpoint.merge import weighted_sum
from ..data.batches import Batch, pretraining_batch
from ..data.mixture import Mixture
from ..errors import UserError
from ..files import read_json, write_aside, write_json
from ..kernels.choose import DTYPES, describe
from ..model.transformer import LingForCausalLM, initialize
from ..progress import Bar, bar, say
from ..recipe import Pretrain, Recipe
from ..stages.context import Context
from ..stages.pretrain import fit_tokenizer, loop_settings, mixture_of, open_domains
from ..stages.training import validator
from ..train.loop import LoopSettings, Progress, advance
from ..train.optimizer import AdamW, build_optimizer
from .picture import curves_picture
from .racers import SPARSE, Racer
from .shapes import useful_flops_per_token

MERGED_PART = 0.25  # the mean is over the snapshots of this last part of the time gone
SNAPSHOTS = 80  # over the whole race, about; a quarter of them is in memory at its end
TRIAL_PART = 0.1  # of the time, for each learning rate that is tried
TRIAL_POINTS = 4
DRAWN_FROM = 0.1  # the picture leaves out the first part, where every curve falls steeply

Validate = Callable[[LingForCausalLM], dict[str, float]]


@dataclass
class Running:
    """One racer under way. `seconds` of training only; `taken` counts all snapshots, `snapshots` are those that a mean still needs."""

    racer: Racer
    settings: LoopSettings
    model: LingForCausalLM
    optimizer: AdamW
    progress: Progress = field(default_factory=Progress)
    seconds: float = 0.0
    taken: int = 0
    snapshots: list[dict[str, Tensor]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Course:
    """What all racers have in common: where batches and validation come from, and the stage's settings."""

    context: Context
    stage: Pretrain
    mixture: Mixture
    batch_at: Callable[[int, int], Batch]
    validate: Validate

    def start(self, racer: Racer) -> Running:
        """The racer with fresh weights."""
        settings = loop_settings(self.context, self.stage, ())
        settings = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, learning_rate=racer.learning_rate))
        model = initialize(LingForCausalLM(fit_tokenizer(self.context, racer.config)), self.context.recipe.seed)
        return Running(racer, settings, model, build_optimizer(model, settings.optimizer))


def first_pretrain(recipe: Recipe) -> Pretrain:
    """The stage whose settings are raced with. Raises `UserError` where the recipe has none."""
    stage = next((stage for stage in recipe.stages if isinstance(stage, Pretrain)), None)
    if stage is None:
        raise UserError(f"stages: '{recipe.name}' has no pretrain stage to race in; give a recipe that has one")
    return stage


def course_of(recipe: Recipe, run_folder: Path) -> Course:
    """The first stage of the recipe that pre-trains, on the text that its data stage left in `run_folder`."""
    stage = first_pretrain(recipe)
    context = Context(recipe, run_folder, stage.name, ("data",), dtype=DTYPES[read_json(run_folder / "machine.json")["precision"]])
    shards = open_domains(context, stage)
    mixture = mixture_of(context, stage, shards)

    def batch_at(first_index: int, sequences: int) -> Batch:
        return pretraining_batch(mixture, shards, first_index, sequences, stage.seq_length)

    return Course(context, stage, mixture, batch_at, validator(context))


def race(course: Course, racers: Sequence[Racer], seconds: float, points: int, rates: Sequence[float], out: Path) -> dict[str, Any]:
    """Train every racer for `seconds`, validating `points` times on the way; returns curves and figures as one plain object.

    `rates`: learning rates; of several, each racer tries all first and takes the best. The folder `out` gets `race.json` and `race.svg`
    after every round. Ctrl-C ends the race after the last whole round: all curves are of the same length then. Raises `UserError`
    where `out` has the results of another race.
    """
    refuse_to_overwrite(out)
    racers = [best_of_rates(course, racer, rates, seconds) for racer in racers]
    running = [course.start(racer) for racer in racers]
    done = 0
    with bar("bench race", round(len(racers) * seconds)) as line:
        try:
            for point in range(1, points + 1):
                run_round(course, running, seconds * point / points, snapshots_a_round(points), line)
                done = point
                write_results(result_of(course, running, done, rates), out)
        except KeyboardInterrupt:
            if not done:
                raise
            say(f"stopped: figures are those after {running[0].curve[done - 1]['seconds']:.0f} s of each")
    for each in running:
        for warning in course.mixture.repeat_warnings(each.progress.next_index):
            say(f"{each.racer.name}: {warning}")
    say(f"wrote {out / 'race.json'} and {out / 'race.svg'}")
    return result_of(course, running, done, rates)


def snapshots_a_round(points: int) -> int:
    return max(1, round(SNAPSHOTS / points))


def run_round(course: Course, running: Sequence[Running], until: float, snapshots: int, line: Bar) -> None:
    """Bring each racer to `until` seconds of training, in turns, keeping snapshots on the way; then validate them all."""
    begun = [racer.seconds for racer in running]
    for part in range(1, snapshots + 1):
        first = part % len(running)
        for number in [*range(first, len(running)), *range(first)]:
            train_until(course, running[number], begun[number] + (until - begun[number]) * part / snapshots, line)
            keep_snapshot(running[number])
    for racer in running:
        racer.curve.append(validated(course, racer))
        line.note(f"{racer.racer.name}: {racer.curve[-1]['bits_per_byte']:.3f} bits per byte")


def train_until(course: Course, running: Running, until: float, line: Bar) -> None:
    """Whole steps until the racer has trained for `until` seconds; drawing batches counts, validation does not."""
    while running.seconds < until:
        started = time.perf_counter()
        advance(running.model, running.optimizer, running.settings, running.progress, course.batch_at, course.stage.batch_sequences)
        took = time.perf_counter() - started
        running.seconds += took
        line.advance(took)


def keep_snapshot(running: Running) -> None:
    """Keep the weights as they are now; drop those that no later mean needs."""
    running.taken += 1
    running.snapshots.append({name: tensor.detach().clone() for name, tensor in running.model.state_dict().items()})
    del running.snapshots[:-math.ceil(MERGED_PART * running.taken)]


def validated(course: Course, running: Running) -> dict[str, Any]:
    """A point of the curve: the mean of the snapshots kept, validated. The weights that are trained stay as they are."""
    states = running.snapshots
    weights = states[-1]
    merged = {name: weighted_sum((state[name] for state in states), [1 / len(states)] * len(states)) for name in weights}
    running.model.load_state_dict(merged)
    by_domain = course.validate(running.model)
    running.model.load_state_dict(weights)
    return {
        "seconds": running.seconds, "steps": running.progress.step, "tokens": running.progress.tokens, "merged": len(states),
        "bits_per_byte": sum(by_domain.values()) / len(by_domain), "by_domain": by_domain,
    }


def best_of_rates(course: Course, racer: Racer, rates: Sequence[float], seconds: float) -> Racer:
    """The racer with the best of the learning rates, each tried for a tenth of the time from fresh weights; a single one is taken.

    Raises `UserError` when training diverges at all of them.
    """
    if len(rates) == 1:
        return dataclasses.replace(racer, learning_rate=rates[0])
    scores = {}
    with bar(f"learning rates, {racer.name}", round(len(rates) * TRIAL_PART * seconds)) as line:
        for rate in rates:
            running = course.start(dataclasses.replace(racer, learning_rate=rate))
            try:
                for point in range(1, TRIAL_POINTS + 1):
                    run_round(course, [running], TRIAL_PART * seconds * point / TRIAL_POINTS, TRIAL_POINTS, line)
            except UserError as error:  # diverged
                say(f"{racer.name}: {error}")
            finished = len(running.curve) == TRIAL_POINTS and math.isfinite(running.curve[-1]["bits_per_byte"])
            scores[rate] = running.curve[-1]["bits_per_byte"] if finished else math.inf
    say(f"{racer.name}, bits per byte by learning rate: " + ", ".join(f"{rate:g}: {score:.3f}" for rate, score in scores.items()))
    best = min(scores, key=scores.__getitem__)
    if math.isinf(scores[best]):
        raise UserError(f"--rates: {racer.name} diverges at all of {', '.join(f'{rate:g}' for rate in rates)}; give lower ones")
    return dataclasses.replace(racer, learning_rate=best)


def result_of(course: Course, running: Sequence[Running], points: int, rates: Sequence[float]) -> dict[str, Any]:
    """Curves and figures after `points` points, which every racer has reached."""
    rows = {each.racer.name: row_of(course, each, points) for each in running}
    ours = rows[SPARSE]["bits_per_byte"]
    below = {name: 1 - ours / row["bits_per_byte"] for name, row in rows.items() if name != SPARSE}
    return {
        "recipe": course.context.recipe.name, "stage": course.stage.name, "seconds": rows[SPARSE]["seconds"], "kernels": describe(),
        "threads": torch.get_num_threads(), "dtype": str(course.context.dtype).removeprefix("torch."), "learning_rates": list(rates),
        "racers": rows, "sparse_below": below, "sparse_below_best": min(below.values()) if below else None,
    }


def row_of(course: Course, running: Running, points: int) -> dict[str, Any]:
    """The figures of one racer after `points` points."""
    config, last = running.model.config, running.curve[points - 1]
    counts, speed = count_parameters(config), last["tokens"] / last["seconds"]
    samples = last["tokens"] // course.stage.seq_length
    return {
        "hidden_size": config.hidden_size, "layers": config.num_hidden_layers, "parameters": counts.total,
        "active_parameters": counts.active, "learning_rate": running.racer.learning_rate, "seconds": last["seconds"],
        "steps": last["steps"], "tokens": last["tokens"], "tokens_per_second": speed,
        "gflops": speed * useful_flops_per_token(config, course.stage.seq_length) / 1e9, "skipped_steps": running.progress.spikes.skipped,
        "epochs": {domain.name: round(course.mixture.epochs(domain.name, samples), 3) for domain in course.mixture.domains},
        "bits_per_byte": last["bits_per_byte"], "by_domain": last["by_domain"], "curve": running.curve[:points],
    }


def refuse_to_overwrite(out: Path) -> None:
    """`UserError` where the folder has results already, for they took long; where it cannot be made, that is seen
    now and not at the end."""
    if (out / "race.json").exists():
        raise UserError(f"{out / 'race.json'}: has the results of another race; give another --out, or move that file away")
    out.mkdir(parents=True, exist_ok=True)


def write_results(result: dict[str, Any], out: Path) -> None:
    """`race.json` and `race.svg` in the folder `out`."""
    write_json(out / "race.json", result)
    lines = {}
    for name, row in result["racers"].items():
        shown = [point for point in row["curve"] if point["seconds"] >= DRAWN_FROM * result["seconds"]]
        label = f"{name} ({row['active_parameters'] / 1e6:.1f} M active of {row['parameters'] / 1e6:.1f} M)"
        lines[label] = ([point["seconds"] / 60 for point in shown], [point["bits_per_byte"] for point in shown])
    threads = f"{result['threads']} threads" if result["threads"] > 1 else "1 thread"
    with write_aside(out / "race.svg") as stream:
        stream.write(curves_picture("Equal time, sparse against dense", f"minutes of training on {threads}",
                                    "validation bits per byte, mean of the domains", lines, zero=False))
