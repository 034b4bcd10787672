"""Contexts longer and shorter than the config's."""

from __future__ import annotations

import pytest
import torch

from sparseling.config import preset
from sparseling.errors import UsageError
from sparseling.model.rotary import rotary_table
from sparseling.run.context import with_context

MINI = preset("ling-mini-2.0")
TRAINED = MINI.max_position_embeddings
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}


def angles(config: object) -> torch.Tensor:
    return rotary_table(config, torch.arange(0, 4096, 17)[None], torch.float32).cos  # type: ignore[arg-type]


def test_what_the_config_has_and_less_changes_no_angle() -> None:
    assert with_context(MINI, None) == (MINI, "") == with_context(MINI, TRAINED)
    shorter, warning = with_context(MINI, 1000)
    assert shorter.max_position_embeddings == 1000 and warning == "" and torch.equal(angles(shorter), angles(MINI))
    for scaling, most in ((YARN, 4 * TRAINED), ({"type": "yarn", "factor": 4.0}, TRAINED)):
        config = MINI.replace(rope_scaling=scaling, max_position_embeddings=most)
        shorter, warning = with_context(config, 1000)
        assert warning == "" and torch.equal(angles(shorter), angles(config))


def test_more_than_the_config_has_is_yarn_and_is_said() -> None:
    longer, warning = with_context(MINI, 4 * TRAINED)
    assert longer.max_position_embeddings == 4 * TRAINED and longer.rope_scaling == YARN
    assert "lacks" in warning and "factor 4" in warning and f"{TRAINED:,}" in warning
    public = MINI.replace(rope_scaling=YARN, max_position_embeddings=4 * TRAINED)
    assert torch.equal(angles(longer), angles(public)) and not torch.equal(angles(longer), angles(MINI))
    assert with_context(public, 4 * TRAINED) == (public, "")
    further, warning = with_context(public, 8 * TRAINED)
    assert further.rope_scaling == YARN | {"factor": 8.0} and "lacks" not in warning
    # a config whose factor already reaches as far as is asked keeps it
    modest = MINI.replace(rope_scaling=YARN)
    assert with_context(modest, 2 * TRAINED)[0].rope_scaling == YARN


@pytest.mark.parametrize("context", [0, -5, 33 * TRAINED])
def test_impossible_contexts_are_refused(context: int) -> None:
    with pytest.raises(UsageError, match="--context"):
        with_context(MINI, context)
