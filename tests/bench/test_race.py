"""The race at a tiny size: equal time for all, means of the last snapshots, models of the sizes that they claim."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from sparseling.accounting import count_parameters
from sparseling.bench import race as race_module
from sparseling.bench.options import EXAMPLES
from sparseling.bench.race import Course, Running, course_of, first_pretrain, race
from sparseling.bench.racers import SPARSE, TWIN, Racer, dense_of_size, dense_twin, racers_of
from sparseling.cli import build_parser, main
from sparseling.config import preset
from sparseling.errors import UserError
from sparseling.model.transformer import LingForCausalLM
from sparseling.recipe import load_recipe
from sparseling.runner import run_recipe
from sparseling.train.loop import LoopSettings

from ..stages.conftest import tiny_recipe


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, its data stage done."""
    folder = tmp_path_factory.mktemp("race")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder)))
    run_recipe(load_recipe(path), folder / "runs" / "tiny", until="data")
    return path


def run(recipe_file: Path, words: str) -> int:
    return main(["bench", "race", str(recipe_file), "--runs", str(recipe_file.parent / "runs"), *words.split()])


def test_every_racer_trains_for_the_time_and_is_validated_on_the_way(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(recipe_file, f"--minutes 0.01 --points 3 --dense 16x1,48x2 --rates 3e-3 --out {tmp_path}/plots --json") == 0
    got = json.loads(capsys.readouterr().out)
    assert list(got["racers"]) == [SPARSE, TWIN, "dense 16x1", "dense 48x2"] and got["learning_rates"] == [3e-3]
    for row in got["racers"].values():
        assert len(row["curve"]) == 3
        for number, point in enumerate(row["curve"], 1):
            assert point["seconds"] >= 0.6 * number / 3
            assert point["tokens"] == point["steps"] * 8 * 64  # the recipe's batch, from the first step on
            assert point["bits_per_byte"] == pytest.approx(sum(point["by_domain"].values()) / 2)
            assert set(point["by_domain"]) == {"prose", "worked"}
        assert row["bits_per_byte"] == row["curve"][-1]["bits_per_byte"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert set(row["epochs"]) == {"prose", "worked"} and all(epochs > 0 for epochs in row["epochs"].values())
    ours = got["racers"][SPARSE]["bits_per_byte"]
    for name, below in got["sparse_below"].items():
        assert below == pytest.approx(1 - ours / got["racers"][name]["bits_per_byte"])
    assert got["sparse_below_best"] == min(got["sparse_below"].values())
    assert json.loads((tmp_path / "plots" / "race.json").read_text()) == got
    picture = (tmp_path / "plots" / "race.svg").read_text()
    ElementTree.fromstring(picture)
    assert all(name in picture for name in got["racers"]) and "minutes of training" in picture


@pytest.fixture
def course(recipe_file: Path) -> Course:
    return course_of(load_recipe(recipe_file), recipe_file.parent / "runs" / "tiny")


def small_racers(course: Course) -> list[Racer]:
    return racers_of(course.context.recipe.model, 3e-3, [(32, 1)])


def test_the_time_is_the_same_for_slow_and_fast_models(course: Course, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the models move: each step takes the more of it, the larger the model."""
    now, order = [0.0], []
    step_seconds = {SPARSE: 0.5, TWIN: 0.3, "dense 32x1": 0.07}

    def advance(model: LingForCausalLM, *rest: object) -> None:
        name = SPARSE if model.routers() else f"dense {model.config.hidden_size}x{model.config.num_hidden_layers}"
        name = name if name in step_seconds else TWIN
        now[0] += step_seconds[name]
        order.append(name)

    monkeypatch.setattr(race_module, "advance", advance)
    monkeypatch.setattr(race_module.time, "perf_counter", lambda: now[0])
    got = race(course, small_racers(course), seconds=40.0, points=4, rates=[3e-3], out=tmp_path)
    for name, row in got["racers"].items():
        for number, point in enumerate(row["curve"], 1):
            assert 10 * number <= point["seconds"] < 10 * number + step_seconds[name] + 1e-6
        assert order.count(name) == pytest.approx(40 / step_seconds[name], abs=1)
        assert [point["merged"] for point in row["curve"]] == [5, 10, 15, 20]
    turns = [name for name, before in zip(order, ["", *order], strict=False) if name != before]
    assert len(turns) >= 60 and set(turns[:3]) == set(step_seconds)


def test_models_learn_in_a_race(course: Course, tmp_path: Path) -> None:
    got = race(course, small_racers(course), seconds=1.5, points=3, rates=[3e-3], out=tmp_path)
    for row in got["racers"].values():
        assert row["curve"][-1]["bits_per_byte"] < row["curve"][0]["bits_per_byte"] < 8


def test_learning_rates_are_tried_for_each_and_the_best_is_taken(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(race_module, "TRIAL_PART", 0.5)
    assert run(recipe_file, f"--minutes 0.01 --points 1 --dense 32x1 --rates 1e-9,3e-3 --out {tmp_path} --json") == 0
    got = json.loads(capsys.readouterr().out)
    assert {row["learning_rate"] for row in got["racers"].values()} == {3e-3} and got["learning_rates"] == [1e-9, 3e-3]


def test_a_diverging_rate_is_not_the_best(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    def advance(model: LingForCausalLM, optimizer: object, settings: LoopSettings, *rest: object) -> None:
        if settings.optimizer.learning_rate > 1:
            raise UserError("training diverged")

    ticks = itertools.count()
    monkeypatch.setattr(race_module, "advance", advance)
    monkeypatch.setattr(race_module.time, "perf_counter", lambda: float(next(ticks)))
    racer = small_racers(course)[0]
    assert race_module.best_of_rates(course, racer, [5.0, 1e-3], seconds=40.0).learning_rate == 1e-3
    with pytest.raises(UserError, match="diverges at all of 5, 6"):
        race_module.best_of_rates(course, racer, [5.0, 6.0], seconds=40.0)


def test_a_point_is_the_mean_of_the_last_quarter_and_leaves_the_weights(course: Course) -> None:
    seen = []

    def look(model: LingForCausalLM) -> dict[str, float]:
        seen.append(model.lm_head.weight.clone())
        return {"prose": 1.0}

    course = dataclasses.replace(course, validate=look)
    running = course.start(Racer("x", course.context.recipe.model.replace(num_nextn_predict_layers=0), 1e-3))
    kept = []
    for number in range(1, 10):
        with torch.no_grad():
            running.model.lm_head.weight.normal_()
        kept.append(running.model.lm_head.weight.clone())
        race_module.keep_snapshot(running)
        assert race_module.validated(course, running)["merged"] == math.ceil(number / 4) == len(running.snapshots)
        torch.testing.assert_close(running.model.lm_head.weight, kept[-1], rtol=0, atol=0)
    torch.testing.assert_close(seen[3], kept[3])
    torch.testing.assert_close(seen[8], (kept[6] + kept[7] + kept[8]) / 3)


def test_ctrl_c_keeps_the_last_whole_round(course: Course, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds = race_module.run_round

    def interrupted(course: Course, running: list[Running], until: float, *rest: Any) -> None:
        rounds(course, running[:1] if until > 0.15 else running, until, *rest)
        if until > 0.15:
            raise KeyboardInterrupt

    monkeypatch.setattr(race_module, "run_round", interrupted)
    got = race(course, small_racers(course), seconds=0.3, points=3, rates=[3e-3], out=tmp_path)
    assert {len(row["curve"]) for row in got["racers"].values()} == {1}
    assert json.loads((tmp_path / "race.json").read_text()) == got


def test_results_of_another_race_are_not_overwritten(recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "race.json").write_text("{}")
    assert run(recipe_file, f"--minutes 0.01 --out {tmp_path}") == 1
    assert "has the results of another race" in capsys.readouterr().err and (tmp_path / "race.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["pico", "nano", "micro", "ling-mini-2.0"])
def test_the_twin_has_as_many_active_parameters_or_a_few_more(name: str) -> None:
    sparse = preset(name).replace(num_nextn_predict_layers=0)
    twin = dense_twin(sparse)
    ours, theirs = count_parameters(sparse).active, count_parameters(twin)
    assert theirs.total == theirs.active >= ours
    assert theirs.active - ours < 32 * 3 * sparse.hidden_size * sparse.num_hidden_layers
    assert dense_of_size(sparse, sparse.hidden_size, sparse.num_hidden_layers) == twin


def test_dense_models_of_other_sizes_keep_the_proportions() -> None:
    sparse = preset("nano")
    for hidden, layers in ((32, 1), (96, 3), (256, 6)):
        config = dense_of_size(sparse, hidden, layers)
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (hidden, layers, hidden // 32)
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert count_parameters(config).total - count_parameters(config).mtp == count_parameters(config).active
        assert math.isclose(config.intermediate_size / hidden, dense_twin(sparse).intermediate_size / 128, rel_tol=0.35)


@pytest.mark.parametrize(
    ("words", "says"),
    [("--dense 50x2", "multiple of the head dimension"), ("--dense 64", "128x4"), ("--dense 0x4", "'0'"), ("--minutes 0", "above 0"),
     ("--rates 1e-3,-1", "above 0")],
)  # fmt: skip
def test_mistakes_are_one_sentence(words: str, says: str, recipe_file: Path, capsys: pytest.CaptureFixture) -> None:
    try:
        assert run(recipe_file, words) == 2
    except SystemExit as stop:  # argparse
        assert stop.code == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_recipe_without_pretraining_is_refused() -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "laptop.yaml")
    assert first_pretrain(recipe).name == "pretrain-1"
    with pytest.raises(UserError, match="has no pretrain stage"):
        first_pretrain(dataclasses.replace(recipe, stages=recipe.stages[-1:]))


def test_the_table_is_for_people(recipe_file: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(recipe_file, "--minutes 0.002 --points 1 --dense 32x1 --rates 1e-3") == 0
    assert (recipe_file.parent / "runs" / "tiny" / "race" / "race.svg").exists()
    text = capsys.readouterr().out
    assert "sparse below" in text and TWIN in text and "prose" in text
    assert build_parser().parse_args(EXAMPLES["race"].split()[1:]).function
