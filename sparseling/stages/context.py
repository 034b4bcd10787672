"""What every stage is given: the recipe, its folder, and where the stages before it left their results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import read_json
from ..recipe import Recipe


@dataclass(frozen=True)
class Context:
    """One stage of one run. `before` names the finished stages in order; a stage with a model left it in `<stage>/model`. `dtype`
    of the activations in training, which happens on `device`."""

    recipe: Recipe
    run_folder: Path
    name: str
    before: tuple[str, ...] = ()
    peak_flops: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return self.run_folder / self.name

    @property
    def data_folder(self) -> Path:
        """What the data stage made: tokenizer/, shards/, baselines.json."""
        return self.run_folder / "data"

    def model_of(self, stage: str) -> Path:
        """The model folder that `stage` left."""
        return self.run_folder / stage / "model"

    def last_model(self) -> Path:
        """The model folder of the newest stage before this one that left one."""
        for stage in reversed(self.before):
            if self.model_of(stage).is_dir():
                return self.model_of(stage)
        raise UserError(f"{self.run_folder}: no stage before '{self.name}' left a model; put a training stage first")


def outputs_of(run_folder: Path, stage: str) -> dict[str, Any]:
    """What a finished stage wrote down in `done.json`."""
    outputs: dict[str, Any] = read_json(run_folder / stage / "done.json")["outputs"]
    return outputs
