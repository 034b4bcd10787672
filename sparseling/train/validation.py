"""Validation in bits per byte: a measure that does not depend on the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ..data.batches import Batch
from ..kernels.cross_entropy import cross_entropy_sum
from ..model.transformer import LingForCausalLM


@torch.inference_mode()
def bits_per_byte(model: LingForCausalLM, batches: Iterable[Batch], text_bytes: int, dtype: torch.dtype | None = None) -> float:
    """Sum of the next-token cross entropy over all labels, in bits, divided by the UTF-8 bytes of the text that they cover.

    `dtype` of the activations, None = that of the weights.
    """
    nats = 0.0
    for batch in batches:
        batch = batch.to(model.lm_head.weight.device)
        hidden = model(batch.input_ids, document_ids=batch.document_ids, dtype=dtype).hidden_states
        nats += cross_entropy_sum(hidden.flatten(0, 1), model.lm_head.weight, batch.labels.flatten()).item()
    return nats / math.log(2) / text_bytes
