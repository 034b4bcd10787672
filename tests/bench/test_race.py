"""The race at a tiny size: equal time for all, means of the last snapshots, and models of the sizes that they claim."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml

from sparseling.accounting import count_parameters
from sparseling.bench import race as race_module
from sparseling.bench.options import EXAMPLES
from sparseling.bench.race import Running, course_of, first_pretrain, race
from sparseling.bench.racers import SPARSE, TWIN, Racer, dense_of_size, dense_twin, racers_of
from sparseling.cli import build_parser, main
from sparseling.config import preset
from sparseling.errors import UserError
from sparseling.model.transformer import LingForCausalLM
from sparseling.recipe import load_recipe
from sparseling.runner import run_recipe

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
    assert run(recipe_file, f"--minutes 0.01 --points 3 --dense 16x1,48x2 --out {tmp_path}/plots --json") == 0
    got = json.loads(capsys.readouterr().out)
    assert list(got["racers"]) == [SPARSE, TWIN, "dense 16x1", "dense 48x2"]
    for row in got["racers"].values():
        assert [point["seconds"] for point in row["curve"]] == sorted(point["seconds"] for point in row["curve"])
        for number, point in enumerate(row["curve"], 1):
            assert point["seconds"] >= 0.6 * number / 3
            assert point["tokens"] == point["steps"] * 8 * 64  # the recipe's batch, from the first step on
            assert point["bits_per_byte"] == pytest.approx(sum(point["by_domain"].values()) / 2)
            assert set(point["by_domain"]) == {"prose", "worked"}
        assert row["bits_per_byte"] == row["curve"][-1]["bits_per_byte"] < row["curve"][0]["bits_per_byte"] + 0.5
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    ours = got["racers"][SPARSE]["bits_per_byte"]
    for name, below in got["sparse_below"].items():
        assert below == pytest.approx(1 - ours / got["racers"][name]["bits_per_byte"])
    assert got["sparse_below_best"] == min(got["sparse_below"].values())
    assert json.loads((tmp_path / "plots" / "race.json").read_text()) == got
    picture = (tmp_path / "plots" / "race.svg").read_text()
    ElementTree.fromstring(picture)
    assert all(name in picture for name in got["racers"]) and "minutes of training" in picture


def test_learning_rates_are_tried_for_each_and_the_best_is_taken(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(race_module, "TRIAL_PART", 0.5)
    assert run(recipe_file, "--minutes 0.01 --points 1 --dense 32x1 --rates 1e-9,3e-3 --json") == 0
    got = json.loads(capsys.readouterr().out)
    assert {row["learning_rate"] for row in got["racers"].values()} == {3e-3}


def test_a_point_is_the_mean_of_the_last_quarter_and_leaves_the_weights(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    course = course_of(recipe, recipe_file.parent / "runs" / "tiny")
    seen = []

    def look(model: LingForCausalLM) -> dict[str, float]:
        seen.append(model.lm_head.weight.clone())
        return {"prose": 1.0}

    course = dataclasses.replace(course, validate=look)
    running: Running = course.start(Racer("x", recipe.model.replace(num_nextn_predict_layers=0), 1e-3))
    kept = []
    for seconds in (1.0, 2.0, 3.0, 4.0):
        running.seconds = seconds
        with torch.no_grad():
            running.model.lm_head.weight.normal_()
        kept.append(running.model.lm_head.weight.clone())
        race_module.keep_snapshot(running)
        assert race_module.validated(course, running)["merged"] == (1 if seconds < 4 else 2)
        torch.testing.assert_close(running.model.lm_head.weight, kept[-1], rtol=0, atol=0)
    torch.testing.assert_close(seen[2], kept[2])
    torch.testing.assert_close(seen[3], (kept[2] + kept[3]) / 2)


def test_ctrl_c_keeps_the_last_whole_round(recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    course = course_of(recipe, recipe_file.parent / "runs" / "tiny")
    rounds = race_module.run_round

    def interrupted(course: race_module.Course, running: list[Running], until: float, line: object) -> None:
        rounds(course, running[:1] if until > 0.15 else running, until, line)
        if until > 0.15:
            raise KeyboardInterrupt

    monkeypatch.setattr(race_module, "run_round", interrupted)
    got = race(course, racers_of(recipe.model, 3e-3, [(32, 1)]), seconds=0.3, points=3, rates=[], out=tmp_path)
    assert {len(row["curve"]) for row in got["racers"].values()} == {1}
    assert json.loads((tmp_path / "race.json").read_text()) == got


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
    assert run(recipe_file, "--minutes 0.002 --points 1 --dense 32x1") == 0
    text = capsys.readouterr().out
    assert "sparse below" in text and TWIN in text and "prose" in text
    assert build_parser().parse_args(EXAMPLES["race"].split()[1:]).function
