"""A recipe file to a checked `Recipe`, and back to YAML with every default written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from ..config import ModelConfig, preset
from ..errors import UsageError, UserError, nearest
from ..schema import parse
from .checks import check_recipe
from .keys import KINDS, Recipe, Sft, Stage, Top


def load_recipe(file: str | Path) -> Recipe:
    """Read and validate a recipe. Raises `UsageError` naming file, key and mend."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); give a recipe such as recipes/laptop.yaml") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is not text in UTF-8; give a recipe such as recipes/laptop.yaml") from None
    try:
        values = yaml.load(text, Loader=UniqueKeys)  # a safe loader
        if values is None:
            raise UsageError("is empty; start from a copy of recipes/laptop.yaml")
        return with_absolute_paths(recipe_from(values), Path(file).resolve().parent)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file}: is not valid YAML{where} ({getattr(error, 'problem', None) or 'unreadable'}); mend it there") from None
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


class UniqueKeys(yaml.SafeLoader):
    """YAML as usual, but a key that is given twice is an error: the first of the two would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:str" and key.value in lines:
                places = f"lines {lines[key.value] + 1} and {key.start_mark.line + 1}"
                raise UsageError(f"{key.value}: is given twice, in {places}; take one out")
            lines[key.value] = key.start_mark.line
        return super().construct_mapping(node, deep)


def with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the user's files as absolute paths: they are meant from the recipe's folder, wherever it is run."""

    def absolute(path: str) -> str:
        return str(folder / Path(path).expanduser())

    data = recipe.data
    files = tuple(dataclasses.replace(file, path=absolute(file.path)) for file in data.documents.files)
    own = data.tokenizer.folder
    tokenizer = dataclasses.replace(data.tokenizer, folder=absolute(own) if own is not None else None)
    documents = dataclasses.replace(data.documents, files=files)
    stages = tuple(dataclasses.replace(s, files=tuple(map(absolute, s.files))) if isinstance(s, Sft) else s for s in recipe.stages)
    return dataclasses.replace(recipe, data=dataclasses.replace(data, documents=documents, tokenizer=tokenizer), stages=stages)


def recipe_from(values: Any) -> Recipe:
    """A recipe from parsed YAML."""
    top = parse(Top, values, "")
    check_name(top.name, "name")
    stages = tuple(stage_from(values, position) for position, values in enumerate(top.stages))
    recipe = Recipe(name=top.name, model=model_from(top.model), data=top.data, stages=stages, seed=top.seed, threads=top.threads,
                    precision=top.precision, device=top.device)
    check_recipe(recipe)
    return recipe


def check_name(name: str, where: str) -> None:
    """A run's name is that of its folder. Raises `UsageError`."""
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise UsageError(f"{where}: '{name}' cannot be a folder name; use letters, digits, '-', '_' and '.'")


def model_from(values: dict[str, Any]) -> ModelConfig:
    """The model of a recipe: a preset, with fields changed."""
    changes = dict(values)
    if "preset" in changes:
        base = preset(str(changes.pop("preset")))
    elif {field.name for field in dataclasses.fields(ModelConfig)} <= set(changes):
        base = ModelConfig()
    else:
        raise UsageError("model.preset: missing; name one, e.g. preset: nano")
    for name, value in changes.items():
        if isinstance(value, str) and name != "rope_scaling":
            try:
                changes[name] = float(value)  # YAML reads 1e-3 as text
            except ValueError:
                raise UsageError(f"model.{name}: '{value}' is not a number") from None
    try:
        return base.replace(**changes)
    except UsageError:
        raise
    except UserError as error:
        raise UsageError(str(error)) from None


def stage_from(values: Any, position: int) -> Stage:
    """One stage by its kind."""
    where = f"stages[{position}]"
    if not isinstance(values, dict) or "kind" not in values:
        raise UsageError(f"{where}.kind: missing; one of {', '.join(KINDS)}")
    if values["kind"] not in KINDS:
        raise UsageError(f"{where}.kind: '{values['kind']}' is unknown; {nearest(str(values['kind']), KINDS)}")
    where = f"stages.{values['name']}" if isinstance(values.get("name"), str) else where
    stage: Stage = parse(KINDS[values["kind"]], values, where)
    return stage


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; it loads to the same recipe."""
    values = dataclasses.asdict(recipe)
    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Tuples as lists, bytes with their unit left out of the way: what YAML and JSON can say."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
