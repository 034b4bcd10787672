"""AdamW over many tensors at once, with gradients scaled on the way, and the norm of all gradients together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from . import reference
from .choose import path_for
from .library import call, require


@dataclass(frozen=True, eq=False)
class Moments:
    """What AdamW keeps of one parameter: steps taken (a fp32 scalar), and the mean and mean square of its gradients."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @staticmethod
    def zero(parameter: Tensor) -> Moments:
        """Before the first step."""
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return Moments(step, torch.zeros_like(parameter), torch.zeros_like(parameter))


@dataclass(frozen=True)
class Rates:
    """What AdamW is told for one step; `grad_scale` multiplies the gradients first."""

    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    grad_scale: float = 1.0


def gradient_norm(grads: Sequence[Tensor]) -> float:
    """The Euclidean norm of all gradients as one vector; 0 for none."""
    if grads and all(on_cpu_path(grad) for grad in grads):
        total = torch.empty(1, dtype=torch.float64)
        grads = [grad.contiguous() for grad in grads]
        call("sum_of_squares", torch.get_num_threads(), len(grads), sizes_of(grads), pointers(grads), total)
        return math.sqrt(float(total))
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


def adamw(parameters: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], decays: Sequence[float], rates: Rates) -> None:
    """Same contract as `reference.adamw`, over many parameters: one step in place, `decays` being each one's weight decay.

    Raises `ValueError` for parameters or moments that are not contiguous.
    """
    if not parameters:
        return
    changed = [each for p, own in zip(parameters, moments, strict=True) for each in (p, own.exp_avg, own.exp_avg_sq)]
    scattered = next((tensor for tensor in changed if not tensor.is_contiguous()), None)
    if scattered is not None:
        raise ValueError(f"a parameter or moment of shape {list(scattered.shape)} is not contiguous")
    if all(on_cpu_path(tensor) for tensor in [*changed, *grads]):
        return adamw_in_cpp(parameters, [grad.contiguous() for grad in grads], moments, decays, rates)
    if path_for(parameters[0]) == "reference":
        for parameter, grad, own, decay in zip(parameters, grads, moments, decays, strict=True):
            reference.adamw(parameter, grad, own.step, own.exp_avg, own.exp_avg_sq, decay, rates.learning_rate, rates.beta1, rates.beta2,
                            rates.epsilon, rates.grad_scale)
        return None
    for decay in sorted(set(decays)):
        of_group = [n for n, each in enumerate(decays) if each == decay]
        scaled = list(torch._foreach_mul([grads[n] for n in of_group], rates.grad_scale))
        kept = [moments[n] for n in of_group]
        torch_adamw([parameters[n] for n in of_group], scaled, [m.exp_avg for m in kept], [m.exp_avg_sq for m in kept], [],
                    [m.step for m in kept], fused=True, amsgrad=False, beta1=rates.beta1, beta2=rates.beta2, lr=rates.learning_rate,
                    weight_decay=decay, eps=rates.epsilon, maximize=False)
    return None


def adamw_in_cpp(parameters: Sequence[Tensor], grads: Sequence[Tensor], moments: Sequence[Moments], decays: Sequence[float],
                 rates: Rates) -> None:
    """The C++ kernel: one pass over every tensor, blocks of them shared among the threads. Nothing is changed when shapes do not fit."""
    for parameter, grad, own in zip(parameters, grads, moments, strict=True):
        require(parameter.shape == grad.shape == own.exp_avg.shape == own.exp_avg_sq.shape, parameter, grad, own.exp_avg, own.exp_avg_sq)
    factors = []
    for own, decay in zip(moments, decays, strict=True):
        own.step.add_(1)
        steps = float(own.step)
        factors.append((1 - rates.learning_rate * decay, rates.learning_rate / (1 - rates.beta1**steps), (1 - rates.beta2**steps) ** -0.5))
    averages, squares = [own.exp_avg for own in moments], [own.exp_avg_sq for own in moments]
    call("adamw", torch.get_num_threads(), len(parameters), float(1 - rates.beta1), float(rates.beta2), float(1 - rates.beta2),
         float(rates.epsilon), float(rates.grad_scale), torch.tensor(factors, dtype=torch.float32), sizes_of(parameters),
         pointers(parameters), pointers(grads), pointers(averages), pointers(squares))
    torch.autograd.graph.increment_version([*parameters, *averages, *squares])  # so that autograd knows, as after an in-place operation


def on_cpu_path(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and path_for(tensor) == "cpu"


def sizes_of(tensors: Sequence[Tensor]) -> Tensor:
    """Elements of each, int64."""
    return torch.tensor([tensor.numel() for tensor in tensors], dtype=torch.int64)


def pointers(tensors: Sequence[Tensor]) -> Tensor:
    """Addresses of the first elements, int64; the tensors must outlive the call."""
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
