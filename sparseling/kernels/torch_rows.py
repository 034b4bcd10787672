"""What lies between the grouped products of experts, in PyTorch operations: the definition of the Triton kernels in triton_rows.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) * up * weight, in fp32, of gate_up [pairs, 2 * width] and weights [pairs] -> [pairs, width]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weights.float()[:, None]).to(gate_up.dtype)


def weighted_swiglu_backward(gate_up: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradient of `weighted_swiglu`'s result [pairs, width]: that of gate_up, the result once more, and that of weights."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu, weighted = gate * sigmoid, grad.float() * weights.float()[:, None]
    product = silu * up
    grad_gate_up = torch.cat([weighted * up * (sigmoid + silu * (1 - sigmoid)), weighted * silu], dim=-1)
    grad_weights = (grad.float() * product).sum(-1).to(weights.dtype)
    return grad_gate_up.to(gate_up.dtype), (product * weights.float()[:, None]).to(gate_up.dtype), grad_weights


def sum_of_slots(rows: Tensor, place: Tensor) -> Tensor:
    """rows [pairs, hidden], place [tokens, k] -> [tokens, hidden]: the k rows of each token, added in fp32."""
    return rows[place].float().sum(1).to(rows.dtype)
