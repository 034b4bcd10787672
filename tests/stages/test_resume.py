"""Stopping and going on: bit-exact after a restart, after SIGKILL at random moments, after SIGTERM; nothing done twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseling.checkpoint.state import list_checkpoints
from sparseling.files import sha256_of_file
from sparseling.recipe import recipe_from
from sparseling.runner import run_recipe
from sparseling.train import loop
from sparseling.train.metrics import read_metrics


def start(recipe: Path, runs: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "sparseling.cli", "run", str(recipe), "--runs", str(runs)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def weights(run: Path) -> dict[str, str]:
    """Hash of every weight file that the stages left."""
    return {
        str(p.relative_to(run)): sha256_of_file(p)
        for p in sorted(run.glob("*/model/*.safetensors")) + sorted(run.glob("*/snapshots/*/*.safetensors"))
    }


def losses(run: Path) -> list[tuple[str, int, float, float]]:
    """(stage, step, loss, grad norm) of every step, in order."""
    return [
        (stage, line["step"], line["loss"], line["grad_norm"])
        for stage in ("pretrain", "midtrain", "sft")
        for line in read_metrics(run / stage / "metrics.jsonl")
        if "loss" in line
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """(recipe file, finished run, seconds) of a run that nobody disturbed."""
    from .conftest import tiny_recipe

    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(folder)))
    started = time.monotonic()
    process = start(recipe, folder / "runs")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return recipe, folder / "runs" / "tiny", time.monotonic() - started


@pytest.mark.parametrize("seed", [1, 2])
def test_sigkill_at_random_moments_ends_with_the_same_final_weights(
    undisturbed: tuple[Path, Path, float], tmp_path: Path, seed: int
) -> None:
    recipe, whole, seconds = undisturbed
    rng, kills = random.Random(seed), 0
    for _ in range(40):
        process = start(recipe, tmp_path)
        try:
            process.wait(timeout=rng.uniform(0.25, 0.7) * seconds if kills < 4 else 300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, process.communicate()[1]
        process.communicate()
        break
    assert kills >= 2
    assert weights(tmp_path / "tiny") == weights(whole) and weights(whole)
    assert losses(tmp_path / "tiny") == losses(whole)
    assert not list((tmp_path / "tiny").rglob("*.tmp")), "something half-written was left behind"


def test_sigterm_saves_says_how_to_go_on_and_the_rest_is_bit_exact(undisturbed: tuple[Path, Path, float], tmp_path: Path) -> None:
    recipe, whole, _ = undisturbed
    process = start(recipe, tmp_path)
    metrics = tmp_path / "tiny" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while len(read_metrics(metrics)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1 and "run the same command to go on" in errors
    steps = [line["step"] for line in read_metrics(metrics) if "loss" in line]
    saved = list_checkpoints(tmp_path / "tiny" / "pretrain" / "checkpoints")
    assert saved and saved[-1].step == steps[-1]
    again = start(recipe, tmp_path)
    assert again.communicate(timeout=300) and again.returncode == 0
    assert weights(tmp_path / "tiny") == weights(whole)


def test_losses_and_weights_of_n_plus_m_steps_equal_n_restart_m(
    recipe_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume bit-exactness, in one process, at a step that no checkpoint interval divides, with a spike on the way."""
    recipe_values["stages"] = recipe_values["stages"][:1]
    recipe = recipe_from(recipe_values)
    real = loop.spikes.is_spike
    monkeypatch.setattr(
        loop.spikes,
        "is_spike",
        lambda rule, state, loss, norm: (len(state.losses) == 6 and not state.skipped) or real(rule, state, loss, norm),
    )
    run_recipe(recipe, tmp_path / "whole")

    class Stop(Exception):
        pass

    original = loop.run_step
    calls = {"n": 0}

    def dies_after_ten(*args: Any) -> Any:
        calls["n"] += 1
        if calls["n"] == 11:
            raise Stop
        return original(*args)

    monkeypatch.setattr(loop, "run_step", dies_after_ten)
    with pytest.raises(Stop):
        run_recipe(recipe, tmp_path / "parts")
    monkeypatch.setattr(loop, "run_step", original)
    run_recipe(recipe, tmp_path / "parts")
    skipped = [line["step"] for line in read_metrics(tmp_path / "whole" / "pretrain" / "metrics.jsonl") if line.get("skipped")]
    assert skipped == [7]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_finished_run_does_nothing_and_a_changed_recipe_is_refused(undisturbed: tuple[Path, Path, float], tmp_path: Path) -> None:
    recipe, whole, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != "recipe.yaml"}
    process = start(recipe, whole.parent)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0 and "already finished" in errors
    assert {p: p.stat().st_mtime_ns for p in before} == before
    changed = tmp_path / "changed.yaml"
    changed.write_text(recipe.read_text().replace("learning_rate: 0.003", "learning_rate: 0.004"))
    process = start(changed, whole.parent)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1 and "other settings" in errors and "--name" in errors
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_summary_and_report_hold_what_machines_and_people_look_for(undisturbed: tuple[Path, Path, float]) -> None:
    _, whole, _ = undisturbed
    summary = json.loads((whole / "summary.json").read_text())
    wanted = {
        "seconds_total",
        "seconds_by_stage",
        "validation_bits_per_byte",
        "baseline_bits_per_byte",
        "accuracy",
        "parameters_total",
        "parameters_active",
        "tokens_trained",
        "merge_gain",
    }
    assert wanted <= set(summary)
    assert set(summary["validation_bits_per_byte"]) == {"prose", "worked"}
    assert set(summary["accuracy"]["maximum"]) == {"off", "on"} and {"accuracy", "low", "high"} <= set(summary["accuracy"]["maximum"]["on"])
    assert summary["seconds_total"] == pytest.approx(sum(summary["seconds_by_stage"].values()), abs=0.1)
    page = (whole / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and 'src="http' not in page


def test_balance_bias_moves_in_pretraining_and_is_frozen_in_fine_tuning(undisturbed: tuple[Path, Path, float]) -> None:
    from sparseling.checkpoint.hf import load_model

    _, whole, _ = undisturbed
    bias = {stage: load_model(whole / stage / "model").routers()[0].expert_bias for stage in ("pretrain", "merge", "sft")}
    assert bias["pretrain"].abs().max() > 0
    assert (bias["merge"] == bias["sft"]).all()
