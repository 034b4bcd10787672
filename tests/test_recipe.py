"""Recipes: every shipped one is valid; every wrong key is answered with the nearest right one; units are checked."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparseling.config import preset
from sparseling.errors import UsageError
from sparseling.recipe import KINDS, Top, load_recipe, recipe_from, resolved

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
BASE: dict[str, Any] = {
    "name": "t",
    "model": {"preset": "pico"},
    "data": {"documents": {"preset": "none"}, "worked": {"tasks": ["maximum"], "bytes": "1MB"}, "tokenizer": {"vocab_size": 512}},
    "stages": [
        {
            "name": "p",
            "kind": "pretrain",
            "tokens": "1M",
            "seq_length": 64,
            "batch_sequences": 4,
            "snapshots": 2,
            "optimizer": {"learning_rate": 1e-3},
            "mixture": {"reasoning": {"share": 1.0, "domains": {"worked": 1}}},
        },
        {"name": "m", "kind": "merge"},
        {"name": "e", "kind": "eval", "tasks": ["maximum"]},
    ],
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_resolve_to_themselves(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe_from(yaml.safe_load(resolved(recipe))) == recipe


def test_published_sizes_have_a_recipe_with_the_published_settings() -> None:
    assert {"laptop", "ling-mini-2.0", "ling-flash-2.0", "ling-1t"} <= {p.stem for p in RECIPES}
    published = {"ling-mini-2.0": (3.36e-4, 4400), "ling-flash-2.0": (2.61e-4, 8352), "ling-1t": (1.86e-4, 18144)}
    for name, (rate, batch) in published.items():
        recipe = load_recipe(next(p for p in RECIPES if p.stem == name))
        first = recipe.stages[0]
        assert (first.optimizer.learning_rate, first.batch_sequences) == (rate, batch)
        assert {
            f.name: getattr(recipe.model, f.name) for f in dataclasses.fields(recipe.model) if f.name in ("hidden_size", "num_experts")
        } == {"hidden_size": preset(name).hidden_size, "num_experts": 256}
        assert first.mixture["reasoning"].share == 0.32 and recipe.stages[1].mixture["reasoning"].share == 0.46


def misspellings(word: str) -> list[str]:
    return [word[:-1] + "x" if len(word) > 4 else word + "x", word[:2] + word[3:], word + "s", word.replace("_", "-")]


@pytest.mark.parametrize("kind", ["top", *KINDS])
def test_every_misspelt_key_is_answered_with_the_nearest_right_one(kind: str) -> None:
    cls = Top if kind == "top" else KINDS[kind]
    names = {f.name for f in dataclasses.fields(cls)}
    for name in names:
        for wrong in misspellings(name):
            if wrong in names or wrong == name or len(name) < 4:
                continue
            values = copy.deepcopy(BASE)
            target = values if kind == "top" else {"name": "x", "kind": kind}
            if kind != "top":
                values["stages"].append(target)
            target[wrong] = 1
            with pytest.raises(UsageError) as caught:
                recipe_from(values)
            assert f"{wrong}: unknown key" in str(caught.value) and f"'{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("stages.0.tokens", "8MB", "is in bytes, this key counts tokens; write 8M"),
        ("stages.0.tokens", "1.5", "not a whole number"),
        ("stages.0.tokens", "many", "not a number"),
        ("stages.0.tokens", True, "not a number"),
        ("stages.0.tokens", "3X", "unknown unit"),
        ("stages.0.tokens", -5, "outside"),
        ("stages.0.tokens", "1e400", "inf is not a number"),
        ("stages.0.tokens", float("nan"), "nan is not a number"),
        ("data.worked.bytes", "4M", "no unit of bytes; write 4MB"),
        ("data.worked.tasks", ["maximim"], "'maximum'"),
        ("stages.0.optimizer", {"learning_rate": "fast"}, "not a number"),
        ("stages.0.learning_rate", 1, "optimizer.learning_rate"),
        ("stages.0.mixture", {"a": {"share": 0.5, "domains": {"worked": 1}}}, "sum to 0.5"),
        ("stages.0.mixture", {"a": {"share": 1, "domains": {"wroked": 1}}}, "'worked'"),
        ("stages.0.kind", "pretrian", "'pretrain'"),
        ("stages.0.snapshots", 0, "snapshots"),
        ("stages.0.seq_length", 512, "max_position_embeddings"),
        ("stages.0.start", "continue", "needs a stage before"),
        ("stages.1.of", "q", "no training stage 'q'"),
        ("stages.2.name", "p", "taken"),
        ("stages.2.modes", ["onn"], "use one of off, on"),
        ("stages.1.curve", "consine", "'cosine'"),
        ("stages.1.decay", [0.5, 0.2], "2 factors"),
        ("stages.0.tokens", 0, "outside"),
        ("stages.2.tasks", [], "nothing to ask"),
        ("data.worked.bytes", 0, "has no text"),
        ("data.documents.max_bytes", {"prosee": "1MB"}, "'prose'"),
        ("data.documents.files", [{"path": "x", "domain": "worked"}], "there is no 'worked'"),
        ("stages.0.mixture", {s: {"share": 0.5, "domains": {"worked": 1}} for s in "ab"}, "name it once"),
        ("model.preset", "picco", "'pico'"),
        ("model.vocab_size", 256, "no room for the 512 rows"),
        ("stages.1.last", 9, "more than the 2"),
        ("model.hidden_sise", 3, "'hidden_size'"),
        ("model.hidden_size", 33.5, "hidden_size"),
        ("name", "../x", "folder name"),
        ("stages", [], "must train"),
        ("data", 3, "expected keys"),
    ],
)
def test_wrong_values_name_the_key_and_the_mend(path: str, value: Any, says: str) -> None:
    values = copy.deepcopy(BASE)
    target: Any = values
    *parents, last = path.split(".")
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[last] = value
    with pytest.raises(Exception, match=says) as caught:
        recipe_from(values)
    assert type(caught.value).__name__ in ("UsageError", "UserError")
    assert last in str(caught.value)


def test_numbers_with_multiples() -> None:
    values = copy.deepcopy(BASE)
    values["stages"][0] |= {"tokens": "1.2M", "optimizer": {"learning_rate": "3e-4"}}
    recipe = recipe_from(values)
    assert recipe.stages[0].tokens == 1_200_000 and recipe.stages[0].optimizer.learning_rate == 3e-4
    assert recipe.data.worked.bytes == 1_000_000


@pytest.mark.parametrize("text", ["{", "\t- a", "[]", "", "name: [", "\x00"])
def test_broken_files_are_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"r\.yaml"):
        load_recipe(file)
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "missing.yaml")


def test_going_on_from_before_a_merge_is_refused() -> None:
    values = copy.deepcopy(BASE)
    again = values["stages"][0] | {"name": "p2", "start": "continue"}
    values["stages"] = [*values["stages"][:2], again]
    with pytest.raises(UsageError, match=r"stages\.p2\.start: 'continue' would go on from before m"):
        recipe_from(values)
    again["start"] = "weights"
    assert recipe_from(values).stages[2].start == "weights"


def test_a_domain_that_no_source_gives_is_named_before_the_run() -> None:
    values = copy.deepcopy(BASE)
    values["stages"][0]["mixture"] = {"reasoning": {"share": 1.0, "domains": {"math": 1}}}
    with pytest.raises(UsageError, match=r"stages\.p\.mixture\.reasoning\.domains\.math: has no text"):
        recipe_from(values)
    values["data"]["documents"]["files"] = [{"path": "sums.txt", "domain": "math"}]
    assert recipe_from(values).stages[0].mixture["reasoning"].domains == {"math": 1}


def test_paths_are_meant_from_the_recipes_folder_wherever_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = copy.deepcopy(BASE)
    values["data"]["documents"]["files"] = [{"path": "texts", "domain": "math"}]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path.parent)
    recipe = load_recipe(Path(tmp_path.name) / "own.yaml")
    assert recipe.data.documents.files[0].path == str(tmp_path / "texts")
    assert recipe_from(yaml.safe_load(resolved(recipe))) == recipe


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text(yaml.safe_dump(BASE) + "seed: 0\nseed: 1\n")
    with pytest.raises(UsageError, match=r"twice\.yaml: seed: is given twice, in lines \d+ and \d+"):
        load_recipe(tmp_path / "twice.yaml")
