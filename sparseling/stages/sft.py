"""The sft stage: conversations in both thinking modes, packed, loss on the assistant's text only, balance bias frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..align.conversations import Conversation, read_conversations, tokenize_conversation
from ..data.batches import Batch, Row, pack, packed_batch
from ..data.tokenizer import Tokenizer
from ..progress import say, track
from ..recipe import Sft
from ..study.tasks.corpus import conversations
from ..train.loop import LoopSettings
from ..train.objective import LossWeights
from .context import Context
from .data import evaluation_prompts
from .training import adamw, run_training, snapshot_steps, start_model


def run(context: Context, stage: Sft) -> dict[str, Any]:
    """Fine-tune the last model; see `run_training` for what is left behind."""
    recipe = context.recipe
    tokenizer = Tokenizer.load(context.data_folder / "tokenizer")
    rows, used = packed_rows(stage, tokenizer, recipe.seed, evaluation_prompts(recipe))
    steps = max(1, len(rows) // stage.batch_sequences) * stage.epochs
    settings = LoopSettings(
        seed=recipe.seed, seq_length=stage.seq_length, step_sequences=(stage.batch_sequences,) * steps, optimizer=adamw(stage.optimizer),
        warmup_steps=stage.optimizer.warmup_steps, micro_batch_sequences=stage.micro_batch_sequences,
        loss_weights=LossWeights(stage.mtp_loss_weight, stage.router_z_loss_weight), bias_update_rate=0.0,
        checkpoint_every=stage.checkpoint_every, snapshot_steps=snapshot_steps(steps, stage.snapshots) if stage.snapshots else (),
        validate_every=stage.validate_every, peak_flops=context.peak_flops, dtype=context.dtype,
    )

    def batch_at(first_index: int, sequences: int) -> Batch:
        return packed_batch(rows, recipe.seed, first_index, sequences)

    outputs = run_training(context, start_model(context.last_model()), settings, batch_at)
    return outputs | {"rows": len(rows), "conversations": used}


def packed_rows(stage: Sft, tokenizer: Tokenizer, seed: int, evaluated: Collection[str]) -> tuple[list[Row], int]:
    """All conversations of the stage, tokenised and packed into rows of `seq_length`, and how many they are.

    Left out and counted: those that are too long, and those of the user's that ask what the recipe's evaluation asks (`evaluated`).
    """
    examples, leaked = [], 0
    evaluated = frozenset(evaluated)
    for conversation in track(all_conversations(stage, seed), f"{stage.name}: conversations", stage.samples if not stage.files else None):
        if any(message.role == "user" and message.content.strip() in evaluated for message in conversation.messages):
            leaked += 1
            continue
        tokenized = tokenize_conversation(conversation, tokenizer)
        examples.append((tokenized.ids, tokenized.loss_mask))
    packed = pack(examples, stage.seq_length, tokenizer.pad_id)
    if leaked:
        say(f"{stage.name}: {leaked} conversations ask what the evaluation asks and are left out")
    if packed.skipped:
        say(f"{stage.name}: {packed.skipped} of {len(examples)} conversations exceed seq_length {stage.seq_length} and are left out")
    return packed.rows, len(examples) - packed.skipped


def all_conversations(stage: Sft, seed: int) -> Iterator[Conversation]:
    """Generated conversations, then those of the user's files."""
    if stage.samples:
        yield from conversations(stage.tasks, seed + 17, stage.samples, stage.thinking_share, stage.talk_share)
    for file in stage.files:
        yield from read_conversations(file)
