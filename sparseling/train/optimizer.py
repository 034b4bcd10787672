"""AdamW as published: betas 0.9 / 0.95, decay 0.1 on matrices only, gradient norm clipped at 1.0 (L2 §3.2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of the optimiser; `learning_rate` is the peak."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


def build_optimizer(model: nn.Module, settings: AdamWSettings) -> torch.optim.AdamW:
    """Two groups: tensors of two or more dimensions are decayed, norms and biases are not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter name, created (as zeros) where there is none yet: what a checkpoint saves and fills."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors |= {f"{name}.{key}": state[key] for key in ("step", "exp_avg", "exp_avg_sq")}
    return tensors


def set_learning_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """Use `rate` for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
