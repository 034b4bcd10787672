"""The router: fp32 sigmoid scores, a bias that only chooses, group-limited top-k (L2 §2.2; DS3 eq. 12 to 16)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.linear import linear
from ..kernels.route import route


@dataclass(frozen=True)
class Routing:
    """Where each token went: logits [tokens, experts] fp32 (before sigmoid and bias), expert_ids and weights [tokens, k], and
    log_norm [tokens], the logsumexp of the logits (for the z-loss)."""

    logits: Tensor
    expert_ids: Tensor
    weights: Tensor
    log_norm: Tensor


class Router(nn.Module):
    """Scores every expert for every token and keeps `num_experts_per_tok` of them."""

    expert_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups, self.groups_kept = config.groups
        self.k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Router:
        """`model.to(bfloat16)` must leave the balance bias in fp32: its steps of 1e-3 vanish in bf16."""
        exact = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = exact.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor) -> Routing:
        """x [tokens, hidden] in any dtype; the product and everything after it are fp32."""
        logits = linear(x.float(), self.weight.float())                          # [tokens, experts]
        return Routing(logits, *route(logits, self.expert_bias, self.groups, self.groups_kept, self.k, self.scale))
