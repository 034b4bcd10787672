"""Cross entropy straight from hidden states, in chunks of tokens: the [tokens, vocab] logits are never kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cuda, reference
from .choose import path_for
from .library import as_weights, call, common, operand_dtype, pad, require, wants_gradient

CHUNK_TOKENS = 1024
GPU_CHUNK_BYTES = 2**30  # of logits on a GPU: every chunk costs a pass over the head's gradient


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor, z_weight: float = 0.0) -> Tensor:
    """Same contract as `reference.cross_entropy_sum`; gradients are computed during the forward when any is wanted.

    hidden [tokens, hidden], head [vocab, hidden], labels [tokens] integers with -100 for "not trained" (such rows cost nothing).
    Returns the sum in nats, a float32 scalar. Raises `IndexError` for a label outside the vocabulary.
    """
    path = path_for(hidden)
    if path == "reference":
        return reference.cross_entropy_sum(hidden, head, labels, z_weight)
    require(labels.shape == hidden.shape[:1], hidden, labels)
    valid = torch.nonzero(labels != -100).squeeze(1)
    if len(valid) < len(labels):
        hidden, labels = hidden.index_select(0, valid), labels.index_select(0, valid)
    labels = labels.long()
    for label in labels.aminmax() if len(labels) else ():
        if not 0 <= label < len(head):
            raise IndexError(f"label {int(label)} is outside the vocabulary of {len(head)}; -100 stands for none")
    if path == "cpu":
        require(hidden.shape == (len(labels), head.shape[1]), hidden, head, labels)
        hidden = hidden.to(operand_dtype(hidden))
        return CpuCrossEntropy.apply(hidden, *as_weights(hidden, head), labels, z_weight, wants_gradient(hidden, head))
    return ChunkedCrossEntropy.apply(hidden, head.to(hidden.dtype), labels, z_weight, wants_gradient(hidden, head))


class CpuCrossEntropy(torch.autograd.Function):
    """The C++ kernel behind `cross_entropy_sum`; all labels valid."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, z_weight: float, needs_grad: bool) -> Tensor:
        x, weight = pad(hidden, 1), pad(head, 1)
        losses = torch.zeros(len(x), dtype=torch.float64)
        grad_x = grad_head = None
        if needs_grad:
            grad_x, grad_head = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        if len(x):
            call("cross_entropy", *common(x, weight), *x.shape, len(head), x, weight, labels.contiguous(), float(z_weight), losses,
                 grad_x, grad_head)
        ctx.save_for_backward(grad_x, grad_head)
        ctx.size, ctx.head_dtype = hidden.shape[1], head.dtype
        return losses.sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scaled_gradients(ctx, grads[0])


def loss_with_gradient(logits: Tensor, labels: Tensor, z_weight: float, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of losses of logits [tokens, vocab] with valid labels [tokens], and its gradient to them, in their dtype, when needed."""
    exact, wanted = logits.float(), labels[:, None]
    log_norm = exact.logsumexp(dim=-1, keepdim=True)
    loss = (log_norm - exact.gather(1, wanted) + z_weight * log_norm.square()).sum()
    if not needs_grad:
        return loss, None
    grad = (exact - log_norm).exp_().mul_(1 + 2 * z_weight * log_norm)
    own = torch.arange(logits.shape[1], device=logits.device) == wanted
    return loss, grad.sub_(own.float()).to(logits.dtype)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The PyTorch path behind `cross_entropy_sum`; all labels valid."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, z_weight: float, needs_grad: bool) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        on_gpu = path_for(hidden) == "cuda"
        softmax = cuda.compiled(loss_with_gradient) if on_gpu else loss_with_gradient
        chunk = max(CHUNK_TOKENS, GPU_CHUNK_BYTES // (hidden.itemsize * len(head))) if on_gpu else CHUNK_TOKENS
        for start in range(0, len(labels), chunk):
            rows, wanted = hidden[start:start + chunk], labels[start:start + chunk]
            loss, grad_logits = softmax(F.linear(rows, head), wanted, z_weight, needs_grad)
            total += loss
            if grad_logits is not None and grad_hidden is not None and grad_head is not None:
                torch.mm(grad_logits, head, out=grad_hidden[start:start + chunk])
                grad_head += torch.mm(grad_logits.t(), rows)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.size, ctx.head_dtype = hidden.shape[1], head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scaled_gradients(ctx, grads[0])


def scaled_gradients(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the forward times that of the sum."""
    grad_hidden, grad_head = (t[:, :ctx.size] for t in ctx.saved_tensors)
    return grad_hidden * scale.item(), (grad_head * scale).to(ctx.head_dtype), None, None, None
