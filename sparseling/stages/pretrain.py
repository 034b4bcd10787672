"""The pretrain stage: a mixture of domains, constant learning rate, growing batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..checkpoint.state import SavedState, checkpoint_folder
from ..data.batches import Batch, pretraining_batch, windows_of
from ..data.mixture import Mixture, build_mixture
from ..data.shards import Shards
from ..model.transformer import LingForCausalLM, initialize
from ..progress import say
from ..recipe import Pretrain, Sft
from ..train.loop import LoopSettings
from ..train.objective import LossWeights
from ..train.schedule import batch_schedule
from .context import Context, outputs_of
from .training import adamw, run_training, snapshot_steps, start_model


def run(context: Context, stage: Pretrain) -> dict[str, Any]:
    """Train on the stage's mixture; see `run_training` for what is left behind."""
    shards = open_domains(context, stage)
    steps = batch_schedule(stage.tokens, stage.seq_length, stage.batch_sequences, stage.batch_start_sequences or stage.batch_sequences,
                           stage.batch_ramp_tokens)
    mixture = mixture_of(context, stage, shards)
    for warning in mixture.repeat_warnings(sum(steps)):
        say(f"{stage.name}: {warning}")
    settings = loop_settings(context, stage, steps)

    def batch_at(first_index: int, sequences: int) -> Batch:
        return pretraining_batch(mixture, shards, first_index, sequences, stage.seq_length)

    outputs = run_training(context, build_model(context, stage), settings, batch_at,
                           last_checkpoint(context) if stage.start == "continue" else None)
    return outputs | {"windows_drawn": {str(stage.seq_length): mixture.drawn(outputs["samples_drawn"])}}


def loop_settings(context: Context, stage: Pretrain, step_sequences: Sequence[int]) -> LoopSettings:
    """The stage's settings for a loop whose steps take so many sequences each."""
    snapshots = snapshot_steps(len(step_sequences), stage.snapshots) if stage.snapshots else ()
    return LoopSettings(
        seed=context.recipe.seed, seq_length=stage.seq_length, step_sequences=tuple(step_sequences), optimizer=adamw(stage.optimizer),
        warmup_steps=0 if stage.start == "continue" else stage.optimizer.warmup_steps, micro_batch_sequences=stage.micro_batch_sequences,
        loss_weights=LossWeights(stage.mtp_loss_weight, stage.router_z_loss_weight), bias_update_rate=stage.bias_update_rate,
        checkpoint_every=stage.checkpoint_every, snapshot_steps=snapshots, validate_every=stage.validate_every,
        peak_flops=context.peak_flops, dtype=context.dtype,
    )


def last_checkpoint(context: Context) -> SavedState:
    """The training state that the newest training stage before this one ended with."""
    stage = trained_before(context)
    steps = outputs_of(context.run_folder, stage)["steps"]
    return SavedState(checkpoint_folder(context.run_folder / stage / "checkpoints", steps), steps)


def open_domains(context: Context, stage: Pretrain) -> dict[str, Shards]:
    """The training shards of every domain that the mixture uses."""
    names = sorted({d for side in stage.mixture.values() if side.share for d, weight in side.domains.items() if weight})
    return {name: Shards.open(context.data_folder / "shards" / "train" / name) for name in names}


def mixture_of(context: Context, stage: Pretrain, shards: dict[str, Shards]) -> Mixture:
    """The order of samples; it goes on in each domain where earlier stages with windows of the same length left off."""
    drawn: dict[str, int] = {}
    for name in context.before[1:]:
        drawn |= outputs_of(context.run_folder, name).get("windows_drawn", {}).get(str(stage.seq_length), {})
    windows = {domain: windows_of(text, stage.seq_length) for domain, text in shards.items()}
    groups = {name: dataclasses.asdict(side) for name, side in stage.mixture.items() if side.share}
    return build_mixture(groups, windows, context.recipe.seed, {domain: drawn.get(domain, 0) for domain in windows})


def build_model(context: Context, stage: Pretrain) -> LingForCausalLM:
    """Fresh weights, or those of the stage before with this stage's RoPE base and context length."""
    config = context.recipe.model
    if stage.start != "fresh":
        config = start_model(context.last_model()).config
    if stage.rope_theta is not None:
        config = config.replace(rope_theta=stage.rope_theta)
    if stage.max_position_embeddings is not None:
        config = config.replace(max_position_embeddings=stage.max_position_embeddings)
    if stage.start == "fresh":
        return initialize(LingForCausalLM(fit_tokenizer(context, config)), context.recipe.seed)
    return start_model(context.last_model(), config)


def fit_tokenizer(context: Context, config: Any) -> Any:
    """The config with the tokenizer's rows and special ids."""
    from ..data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(context.data_folder / "tokenizer")
    return config.replace(
        vocab_size=max(config.vocab_size, tokenizer.vocab_size), pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.eos_id,
    )


def trained_before(context: Context) -> str:
    """The newest training stage before this one."""
    stages = {stage.name: stage for stage in context.recipe.stages}
    return next(name for name in reversed(context.before) if isinstance(stages.get(name), (Pretrain, Sft)))
