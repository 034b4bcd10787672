"""Cross entropy straight from hidden states, in chunks of tokens: the [tokens, vocab] logits are never kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 1024


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Same contract as `reference.cross_entropy_sum`; gradients are computed during the forward when any is wanted.

    hidden [tokens, hidden], head [vocab, hidden], labels [tokens] int64 with -100 for "not trained" (such rows cost nothing).
    Returns the sum in nats, a float32 scalar.
    """
    valid = torch.nonzero(labels >= 0).squeeze(1)
    if len(valid) < len(labels):
        hidden, labels = hidden.index_select(0, valid), labels.index_select(0, valid)
    return ChunkedCrossEntropy.apply(hidden, head, labels)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The autograd node behind `cross_entropy_sum`; all labels valid."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        needs_grad = hidden.requires_grad or head.requires_grad
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), CHUNK_TOKENS):
            rows, wanted = hidden[start:start + CHUNK_TOKENS], labels[start:start + CHUNK_TOKENS, None]
            logits = F.linear(rows, head).float()                            # [chunk, vocab]
            log_norm = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_norm - logits.gather(1, wanted)).sum()
            if grad_hidden is not None and grad_head is not None:
                grad_logits = logits.sub_(log_norm).exp_()
                grad_logits.scatter_add_(1, wanted, grad_logits.new_full((1, 1), -1.0).expand(len(wanted), 1))
                grad_logits = grad_logits.to(head.dtype)
                torch.mm(grad_logits, head, out=grad_hidden[start:start + CHUNK_TOKENS])
                grad_head += torch.mm(grad_logits.t(), rows)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return grad_hidden * grads[0].to(grad_hidden.dtype), (grad_head * grads[0]).to(ctx.head_dtype), None
