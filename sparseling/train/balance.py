"""Balance without an auxiliary loss: the expert bias, and the figures that show how even the load is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model.router import Router, Routing


def expert_counts(routing: list[Routing], num_experts: int) -> Tensor:
    """Tokens routed to each expert, [moe_layers, experts] int64, of one micro-batch. A model may have no such layer."""
    if not routing:
        return torch.zeros(0, num_experts, dtype=torch.int64)
    return torch.stack([torch.bincount(r.expert_ids.reshape(-1), minlength=num_experts) for r in routing])


def update_bias(routers: list[Router], counts: Tensor, rate: float) -> None:
    """bias += rate * (e - mean(e)) with e = sign(mean load - load), once per optimiser step, in place (L2 §2.2, zero-mean variant).

    counts [moe_layers, experts]: tokens of the whole global batch. The mean of the bias stays 0.
    """
    for router, load in zip(routers, counts.double(), strict=True):
        direction = torch.sign(load.mean() - load)
        router.expert_bias += (rate * (direction - direction.mean())).float().to(router.expert_bias.device)


def load_figures(counts: Tensor) -> dict[str, list[float]]:
    """Per layer: max violation (max - mean) / mean, min violation (mean - min) / mean, and the entropy of the load as a share of log E.

    WSM §4 defines the violations. A layer without any token counts as balanced.
    """
    load = counts.double()
    mean = load.mean(-1).clamp_min(1e-9)
    share = load / load.sum(-1, keepdim=True).clamp_min(1e-9)
    entropy = -(share * share.clamp_min(1e-30).log()).sum(-1) / math.log(load.shape[-1])
    return {
        "max_violation": [round(v, 5) for v in ((load.max(-1).values - mean).abs() / mean).tolist()],
        "min_violation": [round(v, 5) for v in ((load.min(-1).values - mean).abs() / mean).tolist()],
        "load_entropy": [round(v, 5) for v in entropy.tolist()],
    }
