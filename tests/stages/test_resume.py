"""Stopping and going on: bit-exact after a restart, after SIGKILL at random moments, after SIGTERM; nothing done twice."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseling.checkpoint.state import list_checkpoints
from sparseling.errors import UserError
from sparseling.files import locked, sha256_of_file
from sparseling.recipe import load_recipe, recipe_from
from sparseling.report.build import write_report
from sparseling.runner import run_recipe
from sparseling.study.tasks.families import evaluation_problems
from sparseling.train import loop
from sparseling.train.metrics import read_metrics

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def start(recipe: Path, runs: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sparseling.cli", "run", str(recipe), "--runs", str(runs)],
        env=ENVIRONMENT,
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
            process.wait(timeout=rng.uniform(0.2, 0.5) * seconds if kills < 5 else 300)
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


# A process that kills itself as SIGKILL does, right before its n-th rename or removal of a folder; it says at which one.
DIES_AT_RENAME = """
import os, shutil, sys
from sparseling import cli
left = int(sys.argv[1])
def counting(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            print("died at", os.path.relpath(str(arguments[0]), sys.argv[2]), flush=True)
            os.kill(os.getpid(), 9)
        return function(*arguments, **named)
    return call
if __name__ == "__main__":
    os.replace, os.rename, shutil.rmtree = counting(os.replace), counting(os.rename), counting(shutil.rmtree)
    sys.exit(cli.main(["run", sys.argv[3], "--runs", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("fewest", "most", "hit"),
    [
        (10, 30, {"data", "pretrain", "midtrain", "sft"}),
        pytest.param(5, 16, {"data", "pretrain", "midtrain", "merge", "sft"}, marks=pytest.mark.slow),
    ],
)
def test_killed_right_before_renames_in_every_stage_ends_with_the_same_final_weights(
    undisturbed: tuple[Path, Path, float], tmp_path: Path, fewest: int, most: int, hit: set[str]
) -> None:
    """Renames and removals are where a file comes to be: one by one they are hit, a seeded few further each time, to the run's end."""
    recipe, whole, _ = undisturbed
    rng, died_at = random.Random(3), []
    (tmp_path / "killed.py").write_text(DIES_AT_RENAME)
    for _ in range(80):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "killed.py"), str(rng.randint(fewest, most)), str(tmp_path), str(recipe)],
            capture_output=True, text=True, timeout=300, env=ENVIRONMENT,
        )  # fmt: skip
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        died_at.append(done.stdout.rpartition("died at ")[2].strip())
    stages = {place.split("/")[1] for place in died_at if place.count("/") > 1}
    assert hit <= stages, died_at
    assert done.returncode == 0 and len(died_at) >= 6
    assert weights(tmp_path / "tiny") == weights(whole) and losses(tmp_path / "tiny") == losses(whole)
    assert not list((tmp_path / "tiny").rglob("*.tmp")), "something half-written was left behind"


def test_two_processes_do_not_work_in_one_folder(undisturbed: tuple[Path, Path, float], tmp_path: Path) -> None:
    recipe, _, _ = undisturbed
    (tmp_path / "tiny").mkdir()
    with locked(tmp_path / "tiny"):
        process = start(recipe, tmp_path)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and f"process {os.getpid()} is working there" in errors and "Traceback" not in errors
    assert [p.name for p in (tmp_path / "tiny").iterdir()] == [".lock"]


def test_a_run_is_finished_only_when_its_report_shows_its_summary(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    recipe_values["stages"] = [recipe_values["stages"][0], recipe_values["stages"][-1]]
    recipe = recipe_from(recipe_values)
    assert run_recipe(recipe, tmp_path / "run", until="pretrain") is None
    write_report(tmp_path / "run")  # a look at the half-finished run
    run_recipe(recipe, tmp_path / "run", until="eval")
    assert run_recipe(recipe, tmp_path / "run") is not None
    assert json.loads((tmp_path / "run/summary.json").read_text())["accuracy"]
    assert "Finished" in (tmp_path / "run/report.html").read_text()
    os.utime(tmp_path / "run/report.html", ns=(0, 0))  # killed between summary and report
    run_recipe(recipe, tmp_path / "run")
    assert (tmp_path / "run/report.html").stat().st_mtime_ns > 0


def test_data_of_other_documents_is_made_again(recipe_values: dict[str, Any], tmp_path: Path) -> None:
    """The documents may change while the data stage is unfinished; nothing made from the old ones may stay."""
    recipe = recipe_from(recipe_values)
    run_recipe(recipe, tmp_path / "changed", until="data")
    (tmp_path / "changed/data/done.json").unlink()
    (tmp_path / "text/00.txt").write_text("Entirely other words came here in the meantime, " * 400)
    run_recipe(recipe, tmp_path / "changed", until="data")
    run_recipe(recipe, tmp_path / "fresh", until="data")
    files = [p.relative_to(tmp_path / "fresh") for p in (tmp_path / "fresh/data").rglob("*") if p.is_file()]
    assert len(files) > 15
    for file in files:
        if file.name not in ("stage.json", "done.json"):
            assert (tmp_path / "changed" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes(), file


def test_no_worked_problem_stands_in_both_training_and_validation_text(undisturbed: tuple[Path, Path, float]) -> None:
    _, whole, _ = undisturbed
    numbers = {split: {tuple(sorted(re.findall(r"\d+", json.loads(line)["text"].split("\n")[0])))
                       for line in (whole / "data/documents" / split / "worked.jsonl").read_text().splitlines()}
               for split in ("train", "validation")}  # fmt: skip
    assert len(numbers["validation"]) > 100 and not numbers["train"] & numbers["validation"]


def test_user_conversations_are_checked_before_training_and_those_of_the_evaluation_left_out(
    recipe_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    talk = tmp_path / "talk.jsonl"
    asked = evaluation_problems("maximum", 4, 0)
    rows = [{"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "42"}]}
            for prompt in ("How are you?", *(problem.prompt for problem in asked))]  # fmt: skip
    values = recipe_values | {"stages": [recipe_values["stages"][0], recipe_values["stages"][3] | {"files": [str(talk)]},
                                         recipe_values["stages"][4]]}  # fmt: skip
    with pytest.raises(UserError, match=r"talk\.jsonl: no such file, but stage 'sft'"):
        run_recipe(recipe_from(values), tmp_path / "run")
    talk.write_text('{"messages": [{"role": "assistant", "content": ""}]}\n')
    assert not (tmp_path / "run/data").exists()  # nothing was trained before it was said
    talk.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_recipe(recipe_from(values), tmp_path / "run", until="sft")
    assert "4 conversations ask what the evaluation asks" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/sft/done.json").read_text())["outputs"]["conversations"] == 61
    (tmp_path / "run/sft/done.json").unlink()
    talk.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match=r"talk\.jsonl: has changed since stage 'sft' began"):
        run_recipe(recipe_from(values), tmp_path / "run", until="sft")


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
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name not in ("recipe.yaml", ".lock")}
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


def test_going_on_with_other_kernels_is_said(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe, run = load_recipe(recipe_file), tmp_path / "run"
    run_recipe(recipe, run, until="data")
    machine = json.loads((run / "machine.json").read_text())
    assert f"kernels: {machine['kernels']}" in capsys.readouterr().err
    (run / "machine.json").write_text(json.dumps(machine | {"kernels": "kernels of another machine"}))
    run_recipe(recipe, run, until="data")
    said = capsys.readouterr().err
    assert f"kernels: {machine['kernels']}" in said and "this run began with kernels of another machine" in said
    del machine["precision"]  # as an older version left it
    (run / "machine.json").write_text(json.dumps(machine))
    run_recipe(recipe, run, until="data")
    assert json.loads((run / "machine.json").read_text())["precision"] in ("bf16", "fp32")
