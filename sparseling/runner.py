"""Running a recipe: stage after stage, each in its folder, each skipped when it is done and unchanged.

`runs/NAME/` alone is enough to go on: the resolved recipe, and for each stage `stage.json` (what it is made from) from its start
and `done.json` (what came out) from its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .accounting import count_parameters
from .align.conversations import check_conversations
from .errors import UserError
from .files import hash_of, locked, read_json, sha256_of_file, write_aside, write_json
from .kernels.choose import DTYPES, default_training_dtype, describe
from .progress import say
from .recipe import Eval, Merge, Pretrain, Recipe, Sft, Stage, plain, resolved
from .stages.context import Context
from .train.device import memory_bytes, one_order_of_adding, training_device
from .train.memory import keep_freed_memory

Run = Callable[[Context], dict[str, Any]]
PEAK_SECONDS = 0.1  # of looking for the matmul peak, for each of nine products: a new run does not wait long


def run_recipe(recipe: Recipe, run_folder: Path, until: str | None = None) -> Path | None:
    """Run every stage that is not done, up to and with `until`; write summary and report. Returns the report, None when `until` stopped it.

    Raises `UserError` when a finished or begun stage in the folder was made from other settings (nothing is overwritten), or when another
    process is at work in the folder. SIGTERM ends it as Ctrl-C does.
    """
    device = training_device(recipe.device)
    refuse_too_large(recipe, device)
    torch.set_num_threads(recipe.threads)
    keep_freed_memory()
    run_folder.mkdir(parents=True, exist_ok=True)
    with locked(run_folder), sigterm_as_interrupt(), one_order_of_adding(device):
        return run_stages(recipe, run_folder, until, device)


def run_stages(recipe: Recipe, run_folder: Path, until: str | None, device: str) -> Path | None:
    """`run_recipe` in a folder that is ours."""
    plan = [("data", hash_of({"data": plain(dataclasses.asdict(recipe.data)), "seed": recipe.seed}), run_function(None))]
    for stage in recipe.stages:
        plan.append((stage.name, stage_hash(recipe, stage, plan[-1][1]), run_function(stage)))
    check_unchanged(run_folder, [(name, own_hash) for name, own_hash, _ in plan])
    with write_aside(run_folder / "recipe.yaml") as stream:
        stream.write(resolved(recipe))
    machine, kernels = machine_of(run_folder, recipe, device), describe(device)
    say(f"kernels: {kernels}, {machine['precision']}")
    if machine["kernels"] != kernels:
        say(f"warning: this run began with {machine['kernels']}: what is left of it will not have the bits that it would have had")
    inputs = {stage.name: files_read_by(stage) for stage in recipe.stages} | {"data": tokenizer_files(recipe)}
    check_files(run_folder, inputs)
    worked = False
    for position, (name, own_hash, function) in enumerate(plan):
        context = Context(recipe, run_folder, name, tuple(n for n, _, _ in plan[:position]), machine["matmul_peak_flops"],
                          DTYPES[machine["precision"]], device)
        worked |= run_stage(context, own_hash, inputs[name], function)
        if name == until:
            return None
    if not worked and is_reported(run_folder):
        say(f"{run_folder}: already finished, nothing to do; see {run_folder / 'report.html'}")
        return run_folder / "report.html"
    from .report.build import write_report
    from .stages.summary import write_summary

    write_summary(recipe, run_folder, machine)
    return write_report(run_folder)


def is_reported(run_folder: Path) -> bool:
    """Whether the report was written after the summary that it shows."""
    summary, report = run_folder / "summary.json", run_folder / "report.html"
    return summary.exists() and report.exists() and report.stat().st_mtime_ns >= summary.stat().st_mtime_ns


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: files written aside are cleaned up and a message is left. The training loop does better, it saves."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def files_read_by(stage: Stage) -> tuple[str, ...]:
    """Files of the user's that a training stage reads itself."""
    return stage.files if isinstance(stage, Sft) else ()


def tokenizer_files(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's own tokenizer, read by the data stage."""
    folder = recipe.data.tokenizer.folder
    return (str(Path(folder) / "tokenizer.json"),) if folder else ()


def check_files(run_folder: Path, inputs: dict[str, tuple[str, ...]]) -> None:
    """Read the user's files once before hours of work, not after: `UserError` for one that is missing or wrong.

    A finished stage needs its files no more.
    """
    for name, files in inputs.items():
        if (run_folder / name / "done.json").exists():
            continue
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"{file}: no such file, but stage '{name}' reads it; correct the path in the recipe")
            if name != "data":
                check_conversations(file)


def run_function(stage: Stage | None) -> Run:
    """The function that runs a stage; None stands for the data stage."""
    from .stages import data, evaluate, merge, pretrain, sft

    match stage:
        case None:
            return data.run
        case Pretrain():
            return lambda context: pretrain.run(context, stage)
        case Sft():
            return lambda context: sft.run(context, stage)
        case Merge():
            return lambda context: merge.run(context, stage)
        case Eval():
            return lambda context: evaluate.run(context, stage)


def stage_hash(recipe: Recipe, stage: Stage, before: str) -> str:
    """Hash of all that a stage's result depends on: its settings, the model, seed and threads, and the stage before it."""
    return hash_of({
        "stage": plain(dataclasses.asdict(stage)), "model": plain(dataclasses.asdict(recipe.model)), "seed": recipe.seed,
        "threads": recipe.threads, "precision": recipe.precision, "before": before,
    })


def check_unchanged(run_folder: Path, hashes: list[tuple[str, str]]) -> None:
    """Refuse to mix results of different settings in one folder, before anything is written."""
    for name, own_hash in hashes:
        begun = run_folder / name / "stage.json"
        if begun.exists() and read_json(begun).get("hash") != own_hash:
            raise UserError(f"{run_folder / name}: was made from other settings than the recipe has now; give another --name, or delete "
                            "this folder and those of the stages after it")


def run_stage(context: Context, own_hash: str, files: tuple[str, ...], function: Run) -> bool:
    """Run one stage unless it is done; True when it was run. The time of sessions that ended in order is added up.

    `files`: what it reads of the user's. Raises `UserError` when one was changed since the stage began: the rest would not fit the start.
    """
    folder = context.folder
    if (folder / "done.json").exists():
        return False
    inputs = {file: sha256_of_file(file) for file in files}
    begun: dict[str, Any] = {"seconds": 0.0, "files": inputs}
    if (folder / "stage.json").exists():
        begun = read_json(folder / "stage.json")
    if begun["files"] != inputs:
        changed = next(file for file in files if begun["files"].get(file) != inputs[file])
        raise UserError(f"{changed}: has changed since stage '{context.name}' began; restore it, or delete {folder} to begin that anew")
    record = {"stage": context.name, "hash": own_hash, "files": inputs}
    write_json(folder / "stage.json", record | {"seconds": begun["seconds"]})
    started = time.perf_counter()
    try:
        outputs = function(context)
    finally:
        seconds = round(begun["seconds"] + time.perf_counter() - started, 2)
        write_json(folder / "stage.json", record | {"seconds": seconds})
    kind = next((stage.kind for stage in context.recipe.stages if stage.name == context.name), "data")
    write_json(folder / "done.json", {"stage": context.name, "kind": kind, "seconds": seconds, "hash": own_hash, "outputs": outputs})
    say(f"{context.name}: done in {seconds:.0f} s")
    return True


def refuse_too_large(recipe: Recipe, device: str) -> None:
    """Training keeps weights, gradients and two moments in fp32: 16 bytes a parameter. Say so before days are lost, not after."""
    needed = 16 * count_parameters(recipe.model).total
    present, what = memory_bytes(device), "machine" if device == "cpu" else "GPU"
    mend = "choose a smaller model" if device == "cpu" else "choose a smaller model, or device: cpu"
    if needed > present:
        raise UserError(f"model: {needed // 16:,} parameters need {needed / 2**30:,.0f} GiB to train on one {what}, this one has "
                        f"{present / 2**30:.0f} GiB; {mend} (training over many machines is not built yet)")


def machine_of(run_folder: Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """What the run runs on, found out once and kept: processor, device, threads, memory, versions, precision, matmul peak in FLOP/s.

    With other threads, another device or another precision it is found out anew, but the kernels that the run began with stay, and so does
    what precision `auto` meant.
    """
    path = run_folder / "machine.json"
    began: dict[str, Any] = read_json(path) if path.exists() else {}
    same = began.get("threads") == recipe.threads and began.get("device", "cpu") == device
    if same and "precision" in began and recipe.precision in ("auto", began["precision"]):
        return began
    from .train.peak import matmul_peak

    if recipe.precision != "auto":
        dtype = DTYPES[recipe.precision]
    else:
        dtype = DTYPES[began["precision"]] if "precision" in began else default_training_dtype(device)
    machine = {
        "processor": processor_name(), "device": device, "cores": os.cpu_count(), "threads": recipe.threads,
        "memory_bytes": memory_bytes("cpu"), "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__, "sparseling": __version__,
        "precision": next(name for name, each in DTYPES.items() if each == dtype), "kernels": began.get("kernels", describe(device)),
        "matmul_peak_flops": round(matmul_peak(dtype, device, PEAK_SECONDS)), "started": time.strftime("%Y-%m-%d %H:%M %Z"),
    }
    write_json(path, machine)
    return machine


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
