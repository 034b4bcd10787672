"""One training step of our own models: the training loop's, on one batch, the balance bias left as it is."""

from __future__ import annotations

import torch

from ..config import ModelConfig
from ..data.batches import NOT_TRAINED, Batch
from ..kernels.choose import Path, forced_path
from ..model.transformer import LingForCausalLM, initialize
from ..train.loop import LoopSettings, Progress, advance
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


def our_candidate(name: str, config: ModelConfig, shape: Shape, dtype: torch.dtype, path: Path = "cpu", device: str = "cpu") -> Candidate:
    """Our model on one path of the kernels: fp32 weights and optimiser, activations in `dtype`."""
    model = initialize(LingForCausalLM(config), SEED).to(device)
    batch = random_batch(shape).to(device)
    settings = LoopSettings(SEED, shape.seq_length, (), AdamWSettings(LEARNING_RATE), micro_batch_sequences=shape.sequences,
                            bias_update_rate=0.0, dtype=dtype)
    optimizer, progress = build_optimizer(model, settings.optimizer), Progress()

    def step() -> float:
        with forced_path(path):
            return advance(model, optimizer, settings, progress, lambda first, sequences: batch, shape.sequences).loss

    return Candidate(name, step)
