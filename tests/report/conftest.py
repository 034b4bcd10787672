"""A run folder as a real run would leave it, made from a seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseling.files import hash_of

DOMAINS = {"prose": 2.05, "tech": 1.9, "code": 1.6, "math": 1.45, "chat": 1.8, "worked": 0.62}
TASKS = ("two_digit_addition", "multiplication", "maximum", "sequence", "count_letter")
RECIPE = """\
name: laptop
seed: 1
model: nano
stages:
  - {name: pretrain, kind: pretrain, tokens: 6_000_000, learning_rate: 3.0e-3}
  - {name: midtrain, kind: pretrain, tokens: 2_500_000, reasoning_share: 0.46}
  - {name: merge, kind: merge, curve: 1-sqrt}
  - {name: sft, kind: sft, tokens: 900_000}
  - {name: eval, kind: eval, prompts: 200}
"""


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def training_lines(
    seed: int, steps: int, batch_tokens: int, loss: tuple[float, float], layers: int = 4, experts: int = 16,
    skipped: tuple[int, ...] = (), skew_left: float = 0.9, bits_left: float = 0.9,
) -> list[dict[str, Any]]:
    """Metrics lines of one stage: loss falls from the first to the second value of `loss`, loads even out, some steps spike."""
    random = np.random.default_rng(seed)
    skew = np.random.default_rng(layers).normal(0, 1, (layers, experts))
    lines: list[dict[str, Any]] = []
    tokens = 0
    for step in range(1, steps + 1):
        ramp = 0.5 if step < steps // 8 else 1.0
        tokens += int(batch_tokens * ramp)
        done = step / steps
        level = loss[1] + (loss[0] - loss[1]) * np.exp(-7 * done) + random.normal(0, 0.02)
        spike = step in skipped
        load = np.exp(skew * (0.12 + skew_left * np.exp(-8 * done)) + random.normal(0, 0.05, (layers, experts)))
        share = load / load.sum(1, keepdims=True)
        relative = share * experts
        lines.append({
            "step": step, "tokens": tokens, "loss": level + 2.5 * spike, "mtp_loss": level * 1.16 + 0.2 + 2 * spike, "z_loss": 1e-4 * level,
            "grad_norm": float(np.exp(random.normal(-0.6 + 1.2 * np.exp(-9 * done), 0.15))) * (40 if spike else 1),
            "learning_rate": 3e-3 * min(1, step / 40), "batch_sequences": int(32 * ramp),
            "tokens_per_second": 14_500 + random.normal(0, 700) - (6000 if step % 97 == 0 else 0), "flops_per_second": 3.1e10,
            "mfu": 0.41 + random.normal(0, 0.02), "max_violation": (relative.max(1) - 1).round(5).tolist(),
            "min_violation": (1 - relative.min(1)).round(5).tolist(),
            "load_entropy": (-(share * np.log(share)).sum(1) / np.log(experts)).round(5).tolist(), "skipped": spike, "seconds": 0.6,
        })
        if step % max(1, steps // 12) == 0:
            bits = {name: end * (1 + bits_left * np.exp(-5 * done) + random.normal(0, 0.003)) for name, end in DOMAINS.items()}
            lines.append({"step": step, "tokens": tokens, "validation_bits_per_byte": bits})
        if step == 1 or step % max(1, steps // 4) == 0:
            lines.append({"step": step, "tokens": tokens, "expert_load": share.round(6).tolist()})
    return lines


def scores(seed: int, strength: float) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    result: dict[str, Any] = {}
    for index, task in enumerate(TASKS):
        result[task] = {}
        for mode in ("off", "on"):
            accuracy = float(np.clip(strength - 0.06 * index - (0.25 if mode == "off" else 0) + random.normal(0, 0.02), 0.01, 0.985))
            half = 1.96 * np.sqrt(accuracy * (1 - accuracy) / 200)
            result[task][mode] = {
                "accuracy": accuracy, "low": max(0.0, accuracy - half), "high": min(1.0, accuracy + half), "n": 200,
                "constant_baseline": 0.5 if task == "maximum" else 0.03 + 0.02 * index,
            }
    return result


def samples() -> list[dict[str, Any]]:
    worked = "47 + 38: 7 + 8 = 15, write 5 carry 1.\n4 + 3 + 1 = 8.\nSo 85."
    return [
        sample("two_digit_addition", "on", "What is 47 + 38?", "85", "85", True) | {"reasoning": worked},
        sample("two_digit_addition", "off", "What is 91 + 26?", "117", "117", True),
        sample("maximum", "off", "Which is the largest of 381, 318, 91?", "318", "381", False),
        sample("count_letter", "on", "How often is e in 'sequence'?", "3", "3", True) | {"reasoning": "s, e 1, q, u, e 2, n, c, e 3"},
        sample("sequence", "on", "3, 7, 11, 15, ?", "19", "19", True) | {"reasoning": "The step is 4. 15 + 4 = 19."},
        sample("multiplication", "off", "What is 64 * 7?", "", "448", False) | {"reasoning": None},
    ]


def sample(task: str, mode: str, prompt: str, answer: str, expected: str, correct: bool) -> dict[str, Any]:
    return {"task": task, "mode": mode, "prompt": prompt, "answer": answer, "expected": expected, "correct": correct}


def summary() -> dict[str, Any]:
    seconds = {"data": 139.4, "pretrain": 411.0, "midtrain": 172.5, "merge": 4.2, "sft": 96.0, "eval": 41.3}
    last = {name: value * (1.015 - 0.004 * index) for index, (name, value) in enumerate(DOMAINS.items())}
    return {
        "seconds_total": sum(seconds.values()) + 6, "seconds_by_stage": seconds, "validation_bits_per_byte": DOMAINS,
        "validation_bits_per_byte_by_stage": {"midtrain": last, "merge": DOMAINS},
        "baseline_bits_per_byte": {
            "order2": {name: value * 1.32 + 0.1 for name, value in DOMAINS.items()},
            "gzip": {name: value * 1.5 + 0.15 for name, value in DOMAINS.items()},
        },
        "accuracy": scores(4, 0.975), "accuracy_by_stage": {"midtrain": scores(3, 0.62), "sft": scores(4, 0.975)},
        "parameters_total": 4_213_760, "parameters_active": 1_502_208, "tokens_trained": 9_400_000, "merge_gain": 0.0214,
        "merge": {"merge": {"of": "midtrain", "last": last, "merged": DOMAINS}},
        "samples": samples(), "stages": [{"name": name, "seconds": value} for name, value in seconds.items()],
        "machine": {
            "processor": "Example CPU @ 2.4 GHz", "cores": 2, "memory_bytes": 16_750_000_000, "torch": "2.13.0",
            "matmul_peak_flops": 75_200_000_000,
        },
    }


def outputs_of(stage: str) -> dict[str, Any]:
    """What a stage's done.json keeps of the figures that end up in the summary."""
    whole = summary()
    kept = {
        "data": {"baseline_bits_per_byte": whole["baseline_bits_per_byte"]},
        "midtrain": {"validation_bits_per_byte": whole["validation_bits_per_byte_by_stage"]["midtrain"]},
        "merge": whole["merge"]["merge"] | {"validation_bits_per_byte": DOMAINS},
        "eval": {"accuracy_by_stage": whole["accuracy_by_stage"], "samples": whole["samples"]},
    }
    return kept.get(stage, {})


def sources() -> dict[str, Any]:
    archives = {"guides-doc_6.1.0_all.deb": "ab12"}
    guides = {"archives": archives, "licence": "GPL-2.0", "domain": "tech", "documents": 4100, "bytes": 21_400_000}
    stories = {"packages": ["stories==1.9"], "licence": "public domain", "domain": "prose", "documents": 930, "bytes": 15_800_000}
    notes = {"path": "notes.txt", "licence": "not stated", "domain": "prose", "documents": 12, "bytes": 93_000}
    return {
        "hash": "cd34", "domains": {"prose": {"documents": 942}}, "skipped": {"letters": "the registry did not answer"},
        "sources": {
            "guides": {**guides, "dropped": {"duplicate": 214, "too short": 96}}, "stories": {**stories, "dropped": {"duplicate": 3}},
            "notes": {**notes, "dropped": {}},
        },
    }


def build_run(folder: Path) -> Path:
    """A finished run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary()), encoding="utf-8")
    for name, seconds in summary()["seconds_by_stage"].items():
        (folder / name).mkdir(exist_ok=True)
        done = {"stage": name, "kind": name, "seconds": seconds, "hash": hash_of(name), "outputs": outputs_of(name)}
        begun = {"stage": name, "hash": hash_of(name), "seconds": seconds}
        (folder / name / "stage.json").write_text(json.dumps(begun), encoding="utf-8")
        (folder / name / "done.json").write_text(json.dumps(done), encoding="utf-8")
    write_lines(folder / "pretrain/metrics.jsonl", training_lines(11, 720, 8192, (8.1, 3.1), skipped=(201, 388, 391)))
    write_lines(folder / "midtrain/metrics.jsonl", training_lines(12, 300, 8192, (3.2, 2.8), skipped=(77,), skew_left=0.15, bits_left=0.04))
    write_lines(folder / "sft/metrics.jsonl", training_lines(13, 150, 6000, (1.9, 0.6), skew_left=0.3, bits_left=0.06))
    (folder / "data/documents").mkdir(parents=True)
    (folder / "data/documents/manifest.json").write_text(json.dumps(sources()), encoding="utf-8")
    (folder / "pretrain/model").mkdir()
    config = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "num_experts": 16}
    (folder / "pretrain/model/config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("finished") / "laptop")


@pytest.fixture
def run_folder(tmp_path: Path, finished_run: Path) -> Path:
    """A finished run of six stages, three of which train; a copy of its own for every test."""
    return Path(shutil.copytree(finished_run, tmp_path / "laptop"))


@pytest.fixture
def stage_lines() -> Callable[..., list[dict[str, Any]]]:
    """Makes the metrics lines of one stage; see `training_lines`."""
    return training_lines
