"""`summary.json`: the run's figures for machines, gathered from what the stages wrote down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..accounting import count_parameters
from ..config import ModelConfig
from ..files import read_json, write_json
from ..recipe import Eval, Merge, Pretrain, Recipe, Sft
from ..study.evaluate import accuracy_table
from .context import outputs_of


def write_summary(recipe: Recipe, run_folder: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Gather and write `summary.json`; keys are described in docs/reference.md."""
    names = ["data", *(stage.name for stage in recipe.stages)]
    done = {name: read_json(run_folder / name / "done.json") for name in names}
    outputs = {name: outputs_of(run_folder, name) for name in names}
    trained = [s for s in recipe.stages if isinstance(s, (Pretrain, Sft))]
    merges = {s.name: outputs[s.name] for s in recipe.stages if isinstance(s, Merge)}
    evaluated = [outputs[s.name] for s in recipe.stages if isinstance(s, Eval)]
    by_stage = {name: cells for result in evaluated for name, cells in result["accuracy_by_stage"].items()}
    parameters = count_parameters(ModelConfig.from_folder(run_folder / trained[-1].name / "model"))
    summary = {
        "name": recipe.name,
        "seconds_total": round(sum(done[name]["seconds"] for name in names), 2),
        "seconds_by_stage": {name: done[name]["seconds"] for name in names},
        "validation_bits_per_byte": base_model_scores(recipe, outputs),
        "validation_bits_per_byte_by_stage": {
            name: values["validation_bits_per_byte"] for name, values in outputs.items() if "validation_bits_per_byte" in values},
        "baseline_bits_per_byte": outputs["data"]["baseline_bits_per_byte"],
        "accuracy": by_stage[evaluated[-1]["result_of"]] if evaluated else {},
        "accuracy_by_stage": by_stage,
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
        "parameters_active_non_embedding": parameters.active_non_embedding,
        "tokens_trained": sum(outputs[s.name]["tokens"] for s in trained),
        "merge_gain": next((merge["gain"] for merge in merges.values()), None),
        "merge": {name: {"of": m["of"], "last": m["last"], "merged": m["merged"], "gain": m["gain"]} for name, m in merges.items()},
        "samples": [sample for result in evaluated for sample in result["samples"]],
        "machine": machine,
        "stages": [{"name": name, "kind": done[name]["kind"], "seconds": done[name]["seconds"]} for name in names],
    }
    write_json(run_folder / "summary.json", summary)
    return summary


def base_model_scores(recipe: Recipe, outputs: dict[str, Any]) -> dict[str, float]:
    """Bits per byte by domain of the base model: the newest stage before fine-tuning, which no longer models plain text."""
    scores: dict[str, float] = {}
    for stage in recipe.stages:
        if isinstance(stage, Sft):
            break
        scores = outputs[stage.name].get("validation_bits_per_byte", scores)
    return scores


def headline_as_text(summary: dict[str, Any]) -> str:
    """Accuracy and bits per byte of a finished run, for the terminal."""
    lines = [accuracy_table(summary["accuracy"])] if summary["accuracy"] else []
    for domain, value in summary["validation_bits_per_byte"].items():
        beside = ", ".join(f"{name} {by[domain]:.2f}" for name, by in summary["baseline_bits_per_byte"].items() if domain in by)
        lines.append(f"{domain}: {value:.2f} bits per byte ({beside})")
    return "\n".join(lines)


def answers_as_text(summary: dict[str, Any], each: int = 2) -> str:
    """A few questions and answers of a finished run, for the terminal."""
    shown: dict[str, int] = {}
    lines = []
    for sample in summary["samples"]:
        cell = f"{sample['task']} {sample['mode']}"
        shown[cell] = shown.get(cell, 0) + 1
        if shown[cell] > each:
            continue
        lines.append(f"[thinking {sample['mode']}] {sample['prompt']}")
        if sample.get("reasoning"):
            lines += [f"    {line}" for line in str(sample["reasoning"]).strip().splitlines()]
        verdict = "" if sample["correct"] else f"   (wrong: {json.dumps(sample['expected'])})"
        lines.append(f"  -> {sample['answer'] or '(no answer)'}{verdict}")
    return "\n".join(lines)
