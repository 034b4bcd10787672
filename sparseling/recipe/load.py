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
from .keys import KINDS, Recipe, Stage, Top


def load_recipe(file: str | Path) -> Recipe:
    """Read and validate a recipe. Raises `UsageError` naming file, key and mend."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); give a recipe such as recipes/laptop.yaml") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is not text in UTF-8; give a recipe such as recipes/laptop.yaml") from None
    try:
        return recipe_from(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: is not valid YAML ({' '.join(str(error).split())}); mend that line") from None
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def recipe_from(values: Any) -> Recipe:
    """A recipe from parsed YAML."""
    top = parse(Top, values, "")
    if not top.name or not all(c.isalnum() or c in "-_." for c in top.name) or top.name.startswith("."):
        raise UsageError(f"name: '{top.name}' cannot be a folder name; use letters, digits, '-', '_' and '.'")
    stages = tuple(stage_from(values, position) for position, values in enumerate(top.stages))
    recipe = Recipe(name=top.name, model=model_from(top.model), data=top.data, stages=stages, seed=top.seed, threads=top.threads)
    check_recipe(recipe)
    return recipe


def model_from(values: dict[str, Any]) -> ModelConfig:
    """The model of a recipe: a preset, with fields changed."""
    changes = dict(values)
    base = preset(str(changes.pop("preset"))) if "preset" in changes else None
    if base is None:
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
    values["model"] = {"preset": "nano", **values["model"]}
    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Tuples as lists, bytes with their unit left out of the way: what YAML and JSON can say."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
