"""One training step of our own models, as the training loop takes it: forward, loss, backward, clipping, AdamW."""

from __future__ import annotations

import torch

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


def our_candidate(name: str, config: ModelConfig, shape: Shape, dtype: torch.dtype, path: Path = "cpu") -> Candidate:
    """Our model on one path of the kernels: fp32 weights and optimiser, activations in `dtype`."""
    model = initialize(LingForCausalLM(config), SEED)
    batch = random_batch(shape)
    valid = count_valid(batch.labels, batch.document_ids, depths=0)

    optimizer = build_optimizer(model, AdamWSettings(LEARNING_RATE))

    def step() -> float:
        with forced_path(path):
            loss = losses(model, batch.input_ids, batch.labels, batch.document_ids, LossWeights(), valid, dtype).total
            loss.backward()
            optimizer.step(LEARNING_RATE, optimizer.gradient_norm())
            optimizer.zero_grad()
            return float(loss.detach())

    return Candidate(name, step)
