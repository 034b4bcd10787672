"""A recipe: one YAML file from data to answers."""

from .keys import (
    KINDS,
    Data,
    Documents,
    Eval,
    HubDataset,
    LocalFiles,
    Merge,
    Optimizer,
    Pretrain,
    Recipe,
    Sft,
    Share,
    Stage,
    TokenizerSettings,
    Top,
    Worked,
    document_keys,
)  # fmt: skip
from .load import check_name, load_recipe, plain, recipe_from, resolved

__all__ = [
    "KINDS", "Data", "Documents", "Eval", "HubDataset", "LocalFiles", "Merge", "Optimizer", "Pretrain", "Recipe", "Sft", "Share", "Stage",
    "TokenizerSettings", "Top", "Worked", "check_name", "document_keys", "load_recipe", "plain", "recipe_from", "resolved",
]  # fmt: skip
