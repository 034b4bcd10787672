"""x w^T for dense projections. Weights may stay fp32 while activations are bf16; their gradient then is fp32."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .choose import path_for
from .library import as_weights, call, common, operand_dtype, pad, require

FEW_ROWS = 8  # below, packing the weights costs more than the product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Same contract as `reference.linear`: x [..., in], weight [out, in], bias [out] -> [..., out] in the dtype of x."""
    few = x.numel() < FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
    path = path_for(x)
    if path == "cpu" and not few:
        require(weight.dim() == 2 and x.shape[-1] == weight.shape[1], x, weight)
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(operand_dtype(x))
        y = CpuLinear.apply(rows, *as_weights(rows, weight)).to(x.dtype).view(*x.shape[:-1], len(weight))
        return y if bias is None else y + bias.to(x.dtype)
    if path == "reference":
        return reference.linear(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class CpuLinear(torch.autograd.Function):
    """x [m, k], weight [n, k] -> [m, n]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x, padded = pad(x, 1), pad(weight, 0, 1)
        y = x.new_empty(len(x), len(padded))
        call("linear_forward", *common(x, padded), len(x), x.shape[1], len(padded), x, padded, y)
        return y[:, :len(weight)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_y = pad(grads[0], 1)
        (m, n), k = grad_y.shape, x.shape[1] + -x.shape[1] % 32
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            padded = pad(weight, 0, 1)
            grad_x = x.new_empty(m, k)
            call("linear_grad_input", *common(grad_y, padded), m, k, n, grad_y, padded, grad_x)
            grad_x = grad_x[:, :x.shape[1]]
        if ctx.needs_input_grad[1]:
            grad_weight = weight.new_zeros(n, k)
            if m:
                call("linear_grad_weight", *common(grad_y, weight), m, k, n, grad_y, pad(x, 1), grad_weight)
            grad_weight = grad_weight[:len(weight), :x.shape[1]]
        return grad_x, grad_weight
