"""A longer context than a model was trained for, by YaRN."""

from __future__ import annotations

from ..config import ModelConfig
from ..errors import UsageError

FURTHEST = 32  # times the trained context; nothing is known to work beyond


def with_context(config: ModelConfig, context: int | None) -> tuple[ModelConfig, str]:
    """The config for `context` tokens, and a sentence for the user where that stretches what the model knows; "" where it does not.

    A shorter context only saves memory. A longer one needs YaRN: with the config's own settings, or (published configs have none) its
    defaults. Raises `UsageError` for a context that cannot be had.
    """
    if context is None or context == config.max_position_embeddings:
        return config, ""
    if context < 1:
        raise UsageError(f"--context: {context} leaves no room for text; give 1 or more tokens")
    if context < config.max_position_embeddings:
        return config.replace(max_position_embeddings=context, rope_scaling=pinned(config)), ""
    scaling = config.rope_scaling or {"type": "yarn"}
    trained = int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
    if context > FURTHEST * trained:
        raise UsageError(f"--context: {context:,} is more than {FURTHEST} times the {trained:,} tokens that this model was trained for; "
                         "give less")
    factor = max(context / trained, float(scaling.get("factor", 1.0)))
    longer = config.replace(max_position_embeddings=context,
                            rope_scaling=scaling | {"factor": factor, "original_max_position_embeddings": trained})
    lacking = "" if config.rope_scaling else ", which its config lacks"
    return longer, (f"context: {context:,} tokens by YaRN with factor {factor:g}{lacking}; the model was trained for {trained:,}: "
                    "answers get worse with the factor, all of them, unless it was trained for more")


def pinned(config: ModelConfig) -> dict[str, object] | None:
    """The YaRN settings with the trained context written down, for `max_position_embeddings` will say something else."""
    if config.rope_scaling is None:
        return None
    return {"original_max_position_embeddings": config.max_position_embeddings} | config.rope_scaling
