"""What pre-training and fine-tuning share: start weights, validation by domain, snapshots, the stage's model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.hf import load_model, save_model
from ..checkpoint.state import SavedState
from ..config import ModelConfig
from ..data.batches import coverage, validation_batches
from ..data.shards import Shards
from ..data.tokenizer import Tokenizer
from ..model.transformer import LingForCausalLM
from ..recipe import Optimizer, Pretrain, Recipe, Sft
from ..train.loop import BatchAt, LoopSettings, Progress, train
from ..train.optimizer import AdamWSettings
from ..train.validation import bits_per_byte
from .context import Context

VALIDATION_ROWS = 16  # windows computed at once


def adamw(settings: Optimizer) -> AdamWSettings:
    """The loop's settings from the recipe's."""
    return AdamWSettings(settings.learning_rate, settings.beta1, settings.beta2, weight_decay=settings.weight_decay,
                         clip_norm=settings.clip_norm)


def snapshot_steps(steps: int, snapshots: int) -> tuple[int, ...]:
    """`snapshots` steps evenly spaced over a stage, the last one at its end."""
    return tuple(sorted({max(1, round(steps * (n + 1) / snapshots)) for n in range(snapshots)}))


def validator(context: Context) -> Callable[[LingForCausalLM], dict[str, float]]:
    """A function that gives bits per byte of every domain that has validation text; the same windows every time.

    Each figure is a complete code of the windows' text: what has no context (the first token of a window or of a document) costs
    log2(vocabulary) bits.
    """
    tokenizer = Tokenizer.load(context.data_folder / "tokenizer")
    window, most_windows = validation_windows(context.recipe)
    folders = sorted(path.parent for path in (context.data_folder / "shards" / "validation").glob("*/manifest.json"))
    texts = {folder.name: Shards.open(folder, tokenizer.sha256) for folder in folders}
    covered = {domain: coverage(shards, tokenizer.text_bytes_per_id, window, most_windows) for domain, shards in texts.items()}

    def validate(model: LingForCausalLM) -> dict[str, float]:
        model.to(context.device)
        scores = {}
        for domain, shards in texts.items():
            batches = validation_batches(shards, VALIDATION_ROWS, window, tokenizer.pad_id, most_windows)
            score = bits_per_byte(model, batches, covered[domain].text_bytes, context.dtype)
            scores[domain] = round(covered[domain].with_first_tokens(score, model.config.vocab_size), 6)
        return scores

    return validate


def validation_windows(recipe: Recipe) -> tuple[int, int]:
    """(tokens of a window, most windows of a domain): as long as the first stage's sequences, so that all stages are measured alike."""
    window = next((stage.seq_length for stage in recipe.stages if isinstance(stage, (Pretrain, Sft))), 256)
    return window, max(1, recipe.data.validation_tokens // window)


def start_model(folder: Path, config: ModelConfig | None = None) -> LingForCausalLM:
    """The model left by an earlier stage, in fp32; `config` replaces its config where only lengths and RoPE differ."""
    model = load_model(folder, dtype=torch.float32)
    if config is not None and config != model.config:
        moved = LingForCausalLM(config)
        moved.load_state_dict(model.state_dict())
        return moved
    return model


def run_training(
    context: Context, model: LingForCausalLM, settings: LoopSettings, batch_at: BatchAt, continue_from: SavedState | None = None
) -> dict[str, Any]:
    """Run the loop in the stage's folder and leave `model/`; returns the stage's outputs."""
    tokenizer = context.data_folder / "tokenizer"
    model = model.to(context.device)

    def snapshot(trained: LingForCausalLM, step: int) -> None:
        folder = context.folder / "snapshots" / f"step-{step:08d}"
        save_model(trained, trained.config, folder, tokenizer, dtype=torch.float32, overwrite=True)

    progress: Progress = train(model, settings, batch_at, context.folder, context.name, validator(context), snapshot, continue_from)
    save_model(model, model.config, context.folder / "model", tokenizer, dtype=torch.float32, overwrite=True)
    return {
        "steps": progress.step, "tokens": progress.tokens, "samples_drawn": progress.next_index, "skipped_steps": progress.spikes.skipped,
        "postponed_left": len(progress.spikes.postponed), "validation_bits_per_byte": validator(context)(model),
    }
