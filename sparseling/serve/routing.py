"""The experts of every token, as JSON for people and as bytes for reinforcement learning; and how busy each expert is."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..run.engine import Engine
from ..run.job import RoutingRows
from ..run.scheduler import Scheduler


class RoutingView:
    """Makes routing readable for one model."""

    def __init__(self, engine: Engine) -> None:
        config = engine.config
        self.layers = moe_layers(config)
        self.groups, self.groups_kept = config.groups
        self.bias = np.stack([bias.numpy() for bias in engine.expert_biases]) if engine.expert_biases else np.zeros((0, 0), np.float32)

    def entries(self, rows: RoutingRows, token_at: Callable[[int], int], text_of: Callable[[int], str]) -> list[dict[str, Any]]:
        """One object a token: its place in prompt and answer, its id and text, and of every MoE layer the experts with their gate weights,
        scores before and after the bias, and the groups that were kept. `part` is for the caller to add."""
        biased = rows.scores + self.bias
        groups = self.kept_groups(biased)
        ids = rows.expert_ids.astype(np.int64)
        parts = [rows.expert_ids, rounded(rows.weights), rounded(np.take_along_axis(rows.scores, ids, 2)),
                 rounded(np.take_along_axis(biased, ids, 2)), groups]
        names = ("experts", "weights", "scores", "biased", "groups")
        columns = [part.tolist() for part in parts]
        entries = []
        for n in range(len(ids)):
            token = token_at(rows.first + n)
            layers = [{"layer": layer, **{name: column[n][i] for name, column in zip(names, columns, strict=True)}}
                      for i, layer in enumerate(self.layers)]
            entries.append({"index": rows.first + n, "part": "", "token": token, "text": text_of(token), "layers": layers})
        return entries

    def kept_groups(self, biased: np.ndarray) -> np.ndarray:
        """[tokens, layers, kept] ids in order: those with the largest sum of their two best biased scores [tokens, layers, experts]."""
        grouped = biased.reshape(*biased.shape[:2], self.groups, -1)
        best = np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
        return np.sort(np.argsort(-best, axis=-1, kind="stable")[..., :self.groups_kept], axis=-1)


def rounded(values: np.ndarray) -> np.ndarray:
    """Five digits are enough to look at."""
    return np.round(values.astype(np.float64), 5)


def routed_experts(parts: list[np.ndarray]) -> str:
    """Base64 of little-endian int32 [tokens read, MoE layers, k], in the order of the tokens."""
    return base64.b64encode(b"".join(part.astype("<i4").tobytes() for part in parts)).decode()


def moe_layers(config: ModelConfig) -> list[int]:
    """The numbers of the layers that have experts."""
    return [layer for layer in range(config.num_hidden_layers) if not config.is_dense(layer)]


def expert_load(scheduler: Scheduler) -> dict[str, Any]:
    """How often each expert was used since the start, over all tokens read."""
    config = scheduler.engine.config
    tokens, counts = scheduler.tokens_read, scheduler.expert_counts.tolist()
    return {
        "num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok, "n_group": config.groups[0],
        "layers": [{"layer": layer, "tokens": tokens, "counts": of_layer}
                   for layer, of_layer in zip(moe_layers(config), counts, strict=True)],
    }


def routing_shown_from(wanted: object, prompt_tokens: int) -> int:
    """The first place that a request with this `routing` is shown."""
    return 0 if wanted == "all" else prompt_tokens
