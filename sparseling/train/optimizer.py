"""AdamW as published: betas 0.9 / 0.95, decay 0.1 on matrices only, gradient norm clipped at 1.0 (L2 §3.2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.adamw import Moments, Rates, adamw, gradient_norm


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of the optimiser; `learning_rate` is the peak."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True, eq=False)
class AdamW:
    """The optimiser of one model: its parameters by name and what is kept of each. Parameters without a gradient are left alone."""

    settings: AdamWSettings
    parameters: dict[str, nn.Parameter]
    moments: dict[str, Moments]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradient_norm(self) -> float:
        """Of all parameters together, before clipping."""
        return gradient_norm([p.grad for p in self.parameters.values() if p.grad is not None])

    @torch.no_grad()
    def step(self, learning_rate: float, grad_norm: float) -> None:
        """One update at this rate, the gradients, whose norm is `grad_norm`, clipped to the settings' norm on the way."""
        settings = self.settings
        given = {name: p for name, p in self.parameters.items() if p.grad is not None}
        decays = [settings.weight_decay if p.dim() >= 2 else 0.0 for p in given.values()]
        scale = min(1.0, settings.clip_norm / (grad_norm + 1e-6))
        rates = Rates(learning_rate, settings.beta1, settings.beta2, settings.epsilon, scale)
        grads = [p.grad for p in given.values() if p.grad is not None]
        adamw(list(given.values()), grads, [self.moments[name] for name in given], decays, rates)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint saves and fills, by parameter name."""
        return {f"{name}.{key}": tensor for name, own in self.moments.items()
                for key, tensor in (("step", own.step), ("exp_avg", own.exp_avg), ("exp_avg_sq", own.exp_avg_sq))}


def build_optimizer(model: nn.Module, settings: AdamWSettings) -> AdamW:
    """An optimiser for all parameters that are trained, its moments zero."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return AdamW(settings, parameters, {name: Moments.zero(p) for name, p in parameters.items()})
