"""Reading a run folder: complete, unfinished, restarted, and broken in every way that a crash or a person breaks it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sparseling.errors import UserError
from sparseling.report.collect import collect
from sparseling.report.metrics import StageMetrics, read_metrics


def metrics_of(tmp_path: Path, text: str | bytes) -> StageMetrics:
    path = tmp_path / "stage/metrics.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_metrics(path)


def line(step: int, **figures: object) -> str:
    return json.dumps({"step": step, "tokens": 10 * step, "loss": float(step), **figures}) + "\n"


def test_a_finished_run_is_read_whole(run_folder: Path) -> None:
    run = collect(run_folder)
    assert run.name == "laptop" and run.notes == ()
    assert [stage.name for stage in run.stages] == ["data", "pretrain", "midtrain", "merge", "sft", "eval"]
    assert all(stage.finished for stage in run.stages) and [stage.name for stage in run.trained] == ["pretrain", "midtrain", "sft"]
    assert run.stages[1].seconds == 411.0 and run.summary.tokens_trained == 9_400_000
    assert run.layer_names == ("1", "2", "3", "MTP")
    assert [(source.name, source.licence) for source in run.sources] == [
        ("guides", "GPL-2.0"), ("stories", "public domain"), ("notes", "not stated")
    ]
    assert run.sources[0].dropped == "duplicate 214, too short 96"
    assert [source.origin for source in run.sources] == ["guides-doc_6.1.0_all.deb", "stories==1.9", "notes.txt"]
    assert run.skipped_sources == {"letters": "the registry did not answer"}
    assert run.summary.machine["memory"] == "16.8\u00a0GB" and run.summary.machine["matmul_peak"] == "75.2\u00a0GFLOP/s"
    first = run.summary.samples[0]
    assert (first.thinking[:8], first.answer, first.correct) == ("47 + 38:", "85", True)


def test_metrics_are_the_logged_numbers(run_folder: Path) -> None:
    lines = [json.loads(text) for text in (run_folder / "pretrain/metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in lines if "loss" in entry]
    metrics = collect(run_folder).stages[1].metrics
    assert metrics is not None and metrics.broken_lines == 0
    np.testing.assert_array_equal(metrics.steps, [entry["step"] for entry in steps])
    for name in ("loss", "mtp_loss", "grad_norm", "skipped", "tokens"):
        np.testing.assert_array_equal(metrics.scalars[name], [entry[name] for entry in steps])
    for name in ("max_violation", "min_violation", "load_entropy"):
        np.testing.assert_allclose(metrics.layers[name], [entry[name] for entry in steps], rtol=1e-6)
    loads = [entry for entry in lines if "expert_load" in entry]
    assert metrics.first_load is not None and metrics.last_load is not None
    np.testing.assert_array_equal(metrics.first_load.shares, loads[0]["expert_load"])
    np.testing.assert_array_equal(metrics.last_load.shares, loads[-1]["expert_load"])
    assert [item.step for item in metrics.validations] == [entry["step"] for entry in lines if "validation_bits_per_byte" in entry]


def test_a_broken_last_line_is_left_out(tmp_path: Path) -> None:
    whole = line(1) + line(2) + line(3)
    for cut in range(len(line(1) + line(2)) + 1, len(whole) - 2):
        metrics = metrics_of(tmp_path, whole[:cut])
        assert metrics.steps.tolist() == [1, 2] and metrics.broken_lines == 1
    assert metrics_of(tmp_path, whole[:-1]).steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "junk",
    [b"\xff\xfe", b"[]", b"null", b"3", b'{"loss": 1}', b'{"step": "x", "loss": 1}', b'{"step": NaN}', b'{"step": -1}', b'{"step": 1e30}',
     b"[" * 100_000],
)
def test_junk_lines_are_counted_and_skipped(tmp_path: Path, junk: bytes) -> None:
    metrics = metrics_of(tmp_path, line(1).encode() + junk + b"\n\n" + line(2).encode())
    assert metrics.steps.tolist() == [1, 2] and metrics.broken_lines == 1


def test_steps_run_again_supersede_the_first_try(tmp_path: Path) -> None:
    def validation(step: int, bits: float) -> str:
        return json.dumps({"step": step, "tokens": 10 * step, "validation_bits_per_byte": {"prose": bits}}) + "\n"

    killed = "".join(line(step, max_violation=[step, 0]) for step in range(1, 6)) + validation(3, 3.0) + validation(5, 5.0)
    again = line(4, loss=40.0, max_violation=[40, 0]) + line(5, loss=50.0, max_violation=[50, 0]) + validation(5, 5.5)
    metrics = metrics_of(tmp_path, killed + again)
    assert metrics.steps.tolist() == [1, 2, 3, 4, 5]
    assert metrics.scalars["loss"].tolist() == [1, 2, 3, 40, 50]
    assert metrics.layers["max_violation"][:, 0].tolist() == [1, 2, 3, 40, 50]
    assert [(item.step, item.bits_per_byte["prose"]) for item in metrics.validations] == [(3, 3.0), (5, 5.5)]


def test_missing_and_odd_figures_are_nan(tmp_path: Path) -> None:
    text = line(1) + line(2, loss=None, max_violation=[1.0, "x", 1e300]) + line(3, grad_norm=math.inf, max_violation=[1.0])
    text += line(4, max_violation=[1, 2, 3, 4]) + line(5, max_violation="no") + line(6, loss=10**400)
    metrics = metrics_of(tmp_path, text)
    assert metrics.steps.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(metrics.scalars["loss"], [1, math.nan, 3, 4, 5, math.inf])
    assert metrics.scalars["grad_norm"][2] == math.inf and math.isnan(metrics.scalars["mtp_loss"][0])
    nan = math.nan
    wanted = [[nan] * 3, [1, nan, math.inf], [1, nan, nan], [1, 2, 3], [nan] * 3, [nan] * 3]
    np.testing.assert_array_equal(metrics.layers["max_violation"], wanted)


def test_ragged_expert_loads_are_padded(tmp_path: Path) -> None:
    text = json.dumps({"step": 1, "tokens": 1, "expert_load": [[0.5, 0.5], [1.0], "x", []]}) + "\n"
    load = metrics_of(tmp_path, text).last_load
    assert load is not None
    np.testing.assert_array_equal(load.shares, [[0.5, 0.5], [1.0, math.nan]])


def test_an_unfinished_run_lists_what_is_to_come(run_folder: Path) -> None:
    (run_folder / "summary.json").unlink()
    for stage in ("midtrain", "merge", "sft", "eval"):
        (run_folder / stage / "done.json").unlink()
        (run_folder / stage / "stage.json").unlink()
    (run_folder / "sft/metrics.jsonl").unlink()
    (run_folder / "midtrain/stage.json").write_text('{"stage": "midtrain", "hash": "ab", "seconds": 12.5}')
    run = collect(run_folder)
    assert [stage.name for stage in run.stages if stage.finished] == ["data", "pretrain"]
    assert [stage.name for stage in run.stages if not stage.begun] == ["merge", "sft", "eval"]
    assert [stage.name for stage in run.stages][2:] == ["midtrain", "merge", "sft", "eval"]
    assert run.stages[2].seconds == 12.5 and run.stages[5].kind == "eval" and math.isnan(run.summary.seconds_total)


def test_without_a_summary_the_stages_own_results_are_shown(run_folder: Path) -> None:
    whole = collect(run_folder).summary
    (run_folder / "summary.json").unlink()
    (run_folder / "machine.json").write_text('{"processor": "Example CPU"}')
    known = collect(run_folder).summary
    assert known.baseline_bits_per_byte == whole.baseline_bits_per_byte and known.merges == whole.merges
    assert known.accuracy_by_stage == whole.accuracy_by_stage and known.samples == whole.samples
    assert known.validation_by_stage == whole.validation_by_stage and len(known.validation_by_stage) == 2
    assert known.machine == {"processor": "Example CPU"}


def test_stages_are_known_from_the_recipe_or_from_folders_alone(run_folder: Path) -> None:
    (run_folder / "recipe.yaml").write_text("stages: [{name: sft, kind: sft}, {name: pretrain, kind: pretrain}]\n")
    (run_folder / "summary.json").unlink()
    assert [stage.name for stage in collect(run_folder).stages][-2:] == ["sft", "pretrain"]
    (run_folder / "recipe.yaml").unlink()
    names = [stage.name for stage in collect(run_folder).stages]
    assert sorted(names) == ["data", "eval", "merge", "midtrain", "pretrain", "sft"]


def test_stage_names_never_lead_out_of_the_run(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/done.json").write_text('{"stage": "outside", "seconds": 1}')
    names = ["../outside", "/etc", "..", ".", "a\0b", "\ud800", "x" * 4000, "", 7, None, {"name": "../outside"}]
    (run_folder / "summary.json").write_text(json.dumps({"stages": names}))
    (run_folder / "recipe.yaml").write_text("stages: [{name: ../outside}, {name: fine, kind: sft}, {name: [1]}]\n")
    names = [stage.name for stage in collect(run_folder).stages]
    assert "fine" in names and not any("outside" in name or "/" in name for name in names)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "null", "\udcff"])
def test_broken_json_files_are_noted(run_folder: Path, text: str) -> None:
    (run_folder / "pretrain/stage.json").unlink()
    for name in ("summary.json", "pretrain/done.json", "data/documents/manifest.json", "pretrain/model/config.json"):
        (run_folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    run = collect(run_folder)
    assert not run.stages[1].finished and run.sources == () and run.layer_names == ("0", "1", "2", "3")
    assert (len(run.notes) == 4) == (text in ("", "{", "\udcff"))


def test_a_broken_recipe_is_shown_as_it_is(run_folder: Path) -> None:
    (run_folder / "recipe.yaml").write_text("stages: [}")
    run = collect(run_folder)
    assert run.recipe == "stages: [}" and any("recipe.yaml" in note for note in run.notes) and len(run.stages) == 6


def test_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such run folder"):
        collect(tmp_path / "nowhere")


def test_an_empty_folder_is_a_run_without_anything(tmp_path: Path) -> None:
    run = collect(tmp_path)
    assert run.stages == () and run.sources == () and run.layer_names == () and run.notes == ()
