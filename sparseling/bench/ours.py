"""One training step of our own models, as the training loop takes it: forward, loss, backward, clipping, AdamW."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..data.batches import NOT_TRAINED, Batch
from ..kernels.choose import Path, forced_path
from ..model.transformer import LingForCausalLM, initialize
from ..train.objective import LossWeights, count_valid, losses
from ..train.optimizer import AdamWSettings, build_optimizer
from .measure import Candidate
from .shapes import Shape

SEED = 0
LEARNING_RATE = 1e-4  # small: the routing must not drift while it is timed


def random_batch(shape: Shape) -> Batch:
    """Random tokens, one document a row, all int64 [sequences, seq_length]."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(shape.vocab, (shape.sequences, shape.seq_length), generator=generator)
    labels = torch.full_like(ids, NOT_TRAINED)
    labels[:, :-1] = ids[:, 1:]
    return Batch(ids, labels, torch.zeros_like(ids))


def optimizing(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """A whole training step around `loss`, the same for every candidate; it returns the loss in nats a token."""
    optimizer = build_optimizer(model, settings := AdamWSettings(LEARNING_RATE))
    parameters = list(model.parameters())

    def step() -> float:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def our_candidate(name: str, config: ModelConfig, shape: Shape, dtype: torch.dtype, path: Path = "cpu") -> Candidate:
    """Our model on one path of the kernels: fp32 weights and optimiser, activations in `dtype`."""
    model = initialize(LingForCausalLM(config), SEED)
    batch = random_batch(shape)
    valid = count_valid(batch.labels, batch.document_ids, depths=0)

    step = optimizing(
        model, lambda: losses(model, batch.input_ids, batch.labels, batch.document_ids, LossWeights(), valid, dtype).total)

    def on_path() -> float:
        with forced_path(path):
            return step()

    return Candidate(name, on_path)
