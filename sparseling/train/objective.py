"""What training minimises: next-token cross entropy, MTP at weight 0.1, router z-loss; all normalised by valid tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.cross_entropy import cross_entropy_sum
from ..model.router import Routing
from ..model.transformer import LingForCausalLM


@dataclass(frozen=True)
class LossWeights:
    """Weights beside the main loss, which has 1: `mtp` over all depths together (L2 §3.2.1), `router_z` (public scripts)."""

    mtp: float = 0.1
    router_z: float = 3.5e-6


@dataclass
class LossSums:
    """Parts of one micro-batch's loss. `total` is what to differentiate; the others are detached sums in nats."""

    total: Tensor
    main: float
    mtp: float
    router_z: float
    routing: list[Routing]


@dataclass(frozen=True)
class Valid:
    """How many labels of the whole optimiser step count: next-token, and per MTP depth. Never below 1."""

    main: int
    mtp: tuple[int, ...]
    tokens: int


def mtp_labels(labels: Tensor, document_ids: Tensor, depth: int) -> Tensor:
    """Labels of MTP depth `depth` >= 1: the token `depth` further on, -100 past the end of the row or of the document.

    labels [batch, seq] are the next tokens already; document_ids [batch, seq].
    """
    shifted = torch.full_like(labels, -100)
    shifted[:, :-depth] = labels[:, depth:]
    same_document = torch.zeros_like(labels, dtype=torch.bool)
    same_document[:, :-depth] = document_ids[:, depth:] == document_ids[:, :-depth]
    return shifted.masked_fill(~same_document, -100)


def count_valid(labels: Tensor, document_ids: Tensor, depths: int) -> Valid:
    """Valid labels of a whole step's batch, before it is cut into micro-batches."""
    deeper = tuple(max(1, int((mtp_labels(labels, document_ids, d) >= 0).sum())) for d in range(1, depths + 1))
    return Valid(max(1, int((labels >= 0).sum())), deeper, labels.numel())


def losses(model: LingForCausalLM, input_ids: Tensor, labels: Tensor, document_ids: Tensor, weights: LossWeights,
           valid: Valid, dtype: torch.dtype | None = None) -> LossSums:
    """Loss of one micro-batch, scaled so that the sum over micro-batches is the step's loss. All tensors [batch, seq].
    `dtype` of the activations, None = that of the weights.

    total = main / valid + mtp weight * mean over depths (sum / valid of the depth) + z weight * sum over layers of the token mean of
    logsumexp(router logits)^2.
    """
    depths = len(valid.mtp) if weights.mtp > 0 else 0
    out = model(input_ids, document_ids=document_ids, with_mtp=depths > 0, dtype=dtype)
    head = model.lm_head.weight
    main = cross_entropy_sum(out.hidden_states.flatten(0, 1), head, labels.flatten())
    total = main / valid.main
    mtp_mean = 0.0
    for depth, hidden in enumerate(out.mtp_hidden_states, start=1):
        mtp = cross_entropy_sum(hidden.flatten(0, 1), head, mtp_labels(labels, document_ids, depth).flatten())
        total = total + weights.mtp / depths * mtp / valid.mtp[depth - 1]
        mtp_mean += mtp.item() / valid.mtp[depth - 1] / depths
    z = torch.stack([routing.log_norm.square().sum() for routing in out.routing]).sum() / valid.tokens if out.routing else None
    if z is not None:
        total = total + weights.router_z * z
    return LossSums(total, main.item(), mtp_mean, z.item() if z is not None else 0.0, out.routing)
