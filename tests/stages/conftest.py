"""A tiny recipe on generated text: a whole run in seconds, no network."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

WORDS = "the of and to in is that it was for on with as his they at be this from have or by one had not but what all were when we".split()  # noqa: SIM905


def tiny_recipe(folder: Path) -> dict[str, Any]:
    """Recipe values whose prose is random English words in `folder`."""
    rng = random.Random(0)
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for n in range(40):
        sentences = (" ".join(rng.choices(WORDS, k=9)).capitalize() + f" {n} {m}." for m in range(30))
        (text / f"{n:02d}.txt").write_text(" ".join(sentences))
    optimizer = {"learning_rate": 3e-3, "warmup_steps": 3}
    mixture = {"general": {"share": 0.5, "domains": {"prose": 1}}, "reasoning": {"share": 0.5, "domains": {"worked": 1}}}
    return {
        "name": "tiny",
        "threads": 1,
        "model": {"preset": "pico"},
        "data": {
            "documents": {"preset": "none", "files": [{"path": str(text), "domain": "prose", "licence": "CC0"}], "validation_share": 0.1},
            "worked": {"tasks": ["two_digit_addition", "maximum"], "bytes": "60KB"},
            "tokenizer": {"vocab_size": 400},
            "validation_tokens": 1024,
        },
        "stages": [
            {
                "name": "pretrain",
                "kind": "pretrain",
                "tokens": 8192,
                "seq_length": 64,
                "batch_sequences": 8,
                "batch_start_sequences": 4,
                "batch_ramp_tokens": 2048,
                "optimizer": optimizer,
                "mixture": mixture,
                "checkpoint_every": 4,
                "snapshots": 2,
            },
            {
                "name": "midtrain",
                "kind": "pretrain",
                "start": "continue",
                "tokens": 4096,
                "seq_length": 64,
                "batch_sequences": 8,
                "optimizer": optimizer,
                "mixture": mixture,
                "checkpoint_every": 3,
                "snapshots": 3,
                "bias_update_rate": 1e-4,
            },
            {"name": "merge", "kind": "merge", "curve": "1-sqrt"},
            {
                "name": "sft",
                "kind": "sft",
                "tasks": ["two_digit_addition", "maximum"],
                "samples": 60,
                "seq_length": 128,
                "batch_sequences": 4,
                "optimizer": optimizer,
                "checkpoint_every": 3,
            },
            {"name": "eval", "kind": "eval", "tasks": ["maximum"], "problems": 4},
        ],
    }


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path)))
    return path


@pytest.fixture
def recipe_values(tmp_path: Path) -> dict[str, Any]:
    """The tiny recipe as values to change."""
    return copy.deepcopy(tiny_recipe(tmp_path))
