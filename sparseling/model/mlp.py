"""The feed-forward part of a layer: one dense SwiGLU, or routed experts with a shared one (L2 §2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..kernels.experts import experts, swiglu
from .linear import Linear
from .router import Router, Routing


class DenseMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, width, bias=False)
        self.up_proj = Linear(hidden, width, bias=False)
        self.down_proj = Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> same."""
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate_up_proj [experts, 2 * width, hidden], down_proj [experts, hidden, width]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(config.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(config.num_experts, hidden, width))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x [tokens, hidden] -> same."""
        return experts(x, routing.expert_ids, routing.weights, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Router, routed experts, and the shared expert that every token uses. No token is dropped."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared_width = config.shared_expert_intermediate_size
        self.shared_experts = DenseMLP(config.hidden_size, shared_width) if shared_width else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x [batch, seq, hidden] -> same, and the routing of its batch * seq tokens."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens)
        y = self.experts(tokens, routing).view_as(x)
        return (y if self.shared_experts is None else y + self.shared_experts(x)), routing
