"""RMSNorm over the last dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, reference
from .choose import path_for
from .library import call, common, operand_dtype, pad, require


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as `reference.rms_norm`: x [..., size], weight [size] -> like x."""
    path = path_for(x)
    if path == "cpu":
        require(weight.shape == x.shape[-1:], x, weight)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(operand_dtype(x))
        return CpuRMSNorm.apply(rows, weight, float(eps)).to(x.dtype).view(x.shape)
    if path == "cuda":
        return cuda.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


class CpuRMSNorm(torch.autograd.Function):
    """x [rows, size], weight [size] of any dtype -> [rows, size], rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        padded, scale = pad(x, 1), pad(weight.float(), 0)
        y = torch.empty_like(padded)
        call("rms_norm_forward", *common(padded), *padded.shape, x.shape[1], eps, padded, scale, y)
        return y[:, :x.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        padded, scale, grad_y = pad(x, 1), pad(weight.float(), 0), pad(grads[0], 1)
        grad_x, grad_weight = torch.empty_like(padded), torch.empty_like(scale)
        call("rms_norm_backward", *common(padded), *padded.shape, x.shape[1], ctx.eps, padded, scale, grad_y, grad_x, grad_weight)
        return grad_x[:, :x.shape[1]], grad_weight[:len(weight)].to(weight.dtype), None
