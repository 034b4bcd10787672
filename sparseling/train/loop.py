"""The training loop of every stage: from a start state and a function that gives batches, to a trained model.

The order of everything is a function of (settings, step): killed at any moment and started again, a stage ends with the same
weights as one that ran through (same machine, same thread count).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accounting import training_flops_per_token
from ..checkpoint.state import SavedState, damage, load_checkpoint, newest_good_checkpoint, save_checkpoint
from ..data.batches import Batch
from ..errors import UserError
from ..model.transformer import LingForCausalLM
from ..progress import bar, say
from . import spikes
from .balance import expert_counts, load_figures, update_bias
from .metrics import MetricsLog, open_metrics
from .objective import LossWeights, count_valid, losses
from .optimizer import AdamW, AdamWSettings, build_optimizer
from .schedule import learning_rate_at

BatchAt = Callable[[int, int], Batch]  # (first sample index, sequences) -> batch; a pure function


@dataclass(frozen=True)
class LoopSettings:
    """One stage of training. `step_sequences` is the batch size of every step; intervals are in steps, 0 = never (but at the end);
    `dtype` of the activations (weights and optimiser keep theirs)."""

    seed: int
    seq_length: int
    step_sequences: tuple[int, ...]
    optimizer: AdamWSettings
    warmup_steps: int = 0
    micro_batch_sequences: int = 16
    loss_weights: LossWeights = LossWeights()
    bias_update_rate: float = 1e-3
    spike_rule: spikes.SpikeRule = spikes.SpikeRule()
    checkpoint_every: int = 200
    snapshot_steps: tuple[int, ...] = ()
    validate_every: int = 0
    peak_flops: float = 0.0
    dtype: torch.dtype = torch.float32


@dataclass
class Progress:
    """Where a stage stands; saved in every checkpoint. `step` steps are done, `next_index` is the first sample not yet drawn."""

    step: int = 0
    next_index: int = 0
    tokens: int = 0
    spikes: spikes.SpikeState = field(default_factory=spikes.SpikeState)

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "next_index": self.next_index, "tokens": self.tokens, "spikes": self.spikes.to_dict()}

    @staticmethod
    def from_dict(saved: dict[str, Any]) -> Progress:
        return Progress(saved["step"], saved["next_index"], saved["tokens"], spikes.SpikeState(**saved["spikes"]))


class Interrupted(UserError):
    """Training was asked to stop and has saved its state."""


@dataclass
class StepResult:
    """Figures of one step, and what became of it."""

    loss: float
    mtp_loss: float | None
    z_loss: float
    grad_norm: float
    learning_rate: float
    verdict: spikes.Verdict
    counts: Tensor
    sequences: int


def train(model: LingForCausalLM, settings: LoopSettings, batch_at: BatchAt, folder: Path, what: str,
          validate: Callable[[LingForCausalLM], dict[str, float]], snapshot: Callable[[LingForCausalLM, int], None],
          continue_from: SavedState | None = None) -> Progress:
    """Train `model` in place to the end of the stage, resuming from `folder/checkpoints` when there is something to resume.

    `continue_from`: the last checkpoint of an earlier stage whose optimiser state this one takes over (its own progress starts at 0).
    `snapshot(model, step)` keeps weights for merging at `settings.snapshot_steps`. On SIGINT or SIGTERM the state is saved after
    the running step and `Interrupted` is raised.
    """
    optimizer = build_optimizer(model, settings.optimizer)
    tensors = {"model": dict(model.state_dict()), "optimizer": optimizer.tensors()}
    progress = restore(folder / "checkpoints", continue_from, tensors)
    steps = len(settings.step_sequences)

    def save() -> None:
        save_checkpoint(folder / "checkpoints", progress.step, tensors, progress.to_dict())

    with open_metrics(folder, progress.step) as log, stop_requests() as stop, bar(what, steps, progress.step) as line:
        while progress.step < steps:
            started = time.perf_counter()
            result = advance(model, optimizer, settings, progress, batch_at, settings.step_sequences[progress.step])
            log.write(progress.step, step_metrics(model, settings, progress, result, time.perf_counter() - started))
            line.note(note_of(settings, result, time.perf_counter() - started))
            line.advance()
            last = progress.step == steps
            if last or (settings.validate_every and progress.step % settings.validate_every == 0):
                log_validation(log, model, progress, result, validate)
            if progress.step in settings.snapshot_steps:
                snapshot(model, progress.step)
            if last or (settings.checkpoint_every and progress.step % settings.checkpoint_every == 0) or stop:
                save()
            if stop:
                raise Interrupted(f"{what}: stopped by {stop[0]} and saved at step {progress.step} of {steps}; "
                                  "run the same command to go on")
    return progress


def restore(own: Path, continue_from: SavedState | None, tensors: dict[str, dict[str, Tensor]]) -> Progress:
    """Fill the tensors from this stage's newest good checkpoint, else from the end of the stage it continues, else leave them."""
    if (checkpoint := newest_good_checkpoint(own)) is not None:
        progress = Progress.from_dict(load_checkpoint(checkpoint, tensors))
        say(f"resuming from {checkpoint.folder} (step {progress.step})")
        return progress
    if continue_from is not None:
        # An older checkpoint of that stage would do, but would change the result without a word.
        if problem := damage(continue_from.folder):
            stage = continue_from.folder.parents[1]
            raise UserError(f"{continue_from.folder}: the stage before ended there, but {problem}; restore it, or delete "
                            f"{stage / 'done.json'} and run again to repeat the end of that stage")
        load_checkpoint(continue_from, tensors)
    return Progress()


def advance(model: LingForCausalLM, optimizer: AdamW, settings: LoopSettings, progress: Progress, batch_at: BatchAt,
            new_sequences: int) -> StepResult:
    """One step further: a batch (of `new_sequences`, if it is a new one) is drawn, run and counted."""
    batch_range = choose_batch(progress, new_sequences)
    result = run_step(model, optimizer, settings, progress, batch_at(*batch_range[:2]), batch_range)
    progress.step += 1
    if result.verdict != "skip":
        progress.tokens += result.sequences * settings.seq_length
    return result


def choose_batch(progress: Progress, new_sequences: int) -> tuple[int, int, bool]:
    """(first sample index, sequences, second time) of the next step: a postponed batch that is due, else the next new one."""
    due = spikes.due_batch(progress.spikes, progress.step)
    if due is not None:
        return *due, True
    first = progress.next_index
    progress.next_index += new_sequences
    return first, new_sequences, False


def run_step(model: LingForCausalLM, optimizer: AdamW, settings: LoopSettings, progress: Progress, batch: Batch,
             batch_range: tuple[int, int, bool]) -> StepResult:
    """Gradients over micro-batches, the spike rule, then at most one update of weights and balance bias."""
    config, device = model.config, model.lm_head.weight.device
    batch = batch.to(device)
    depths = config.num_nextn_predict_layers if settings.loss_weights.mtp > 0 else 0
    valid = count_valid(batch.labels, batch.document_ids, depths)
    optimizer.zero_grad()
    layers = len(model.routers()) - (config.num_nextn_predict_layers - depths)
    counts = torch.zeros(layers, config.num_experts, dtype=torch.int64, device=device)
    loss = mtp_loss = z_loss = 0.0
    for start in range(0, len(batch.labels), settings.micro_batch_sequences):
        rows = slice(start, start + settings.micro_batch_sequences)
        part = losses(model, batch.input_ids[rows], batch.labels[rows], batch.document_ids[rows], settings.loss_weights, valid,
                      settings.dtype)
        part.total.backward()
        counts += expert_counts(part.routing, config.num_experts).to(device)
        loss, mtp_loss, z_loss = loss + part.main / valid.main, mtp_loss + part.mtp, z_loss + part.router_z
    grad_norm = optimizer.gradient_norm()
    first, sequences, second_time = batch_range
    verdict = spikes.judge(settings.spike_rule, progress.spikes, loss, grad_norm, second_time)
    spikes.remember(settings.spike_rule, progress.spikes, verdict, progress.step, (first, sequences), loss, grad_norm, second_time,
                    settings.seed)
    rate = learning_rate_at(progress.step, settings.optimizer.learning_rate, settings.warmup_steps)
    if verdict == "take slowly":
        rate *= settings.spike_rule.slow_factor
    if verdict == "skip":
        refuse_endless_divergence(progress.spikes, settings.spike_rule, loss, progress.step)
    else:
        optimizer.step(rate, grad_norm)
        if settings.bias_update_rate:
            update_bias(model.routers()[: len(counts)], counts, settings.bias_update_rate)
    return StepResult(loss, mtp_loss if depths else None, z_loss, grad_norm, rate, verdict, counts, sequences)


def refuse_endless_divergence(state: spikes.SpikeState, rule: spikes.SpikeRule, loss: float, step: int) -> None:
    """Only losses that are not finite are skipped without end: that run is lost, say so."""
    if state.skipped_in_a_row > 10 * rule.skips_in_a_row:
        raise UserError(f"training diverged: the loss was {loss} at step {step}, {state.skipped_in_a_row} steps in a row were skipped; "
                        "lower the learning_rate")


def step_metrics(model: LingForCausalLM, settings: LoopSettings, progress: Progress, result: StepResult,
                 seconds: float) -> dict[str, Any]:
    """The figures of one step under their public names."""
    tokens = result.sequences * settings.seq_length
    config = model.config if settings.loss_weights.mtp > 0 else model.config.replace(num_nextn_predict_layers=0)
    flops = training_flops_per_token(config, settings.seq_length) * tokens / seconds
    return {
        "tokens": progress.tokens, "loss": result.loss, "mtp_loss": result.mtp_loss, "z_loss": result.z_loss, "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate, "batch_sequences": result.sequences, "tokens_per_second": round(tokens / seconds, 1),
        "flops_per_second": round(flops), "mfu": round(flops / settings.peak_flops, 4) if settings.peak_flops else None,
        "skipped": result.verdict == "skip", "slowed": result.verdict == "take slowly", "seconds": round(seconds, 4),
    } | load_figures(result.counts)


def log_validation(log: MetricsLog, model: LingForCausalLM, progress: Progress, result: StepResult,
                   validate: Callable[[LingForCausalLM], dict[str, float]]) -> None:
    """Bits per byte by domain, and the expert loads of the last step as shares for the heat map."""
    share = result.counts.double() / result.counts.sum(-1, keepdim=True).clamp_min(1)
    log.write(progress.step, {"tokens": progress.tokens, "expert_load": [[round(x, 6) for x in layer] for layer in share.tolist()]})
    scores = validate(model)
    if scores:
        log.write(progress.step, {"tokens": progress.tokens, "validation_bits_per_byte": scores})


def note_of(settings: LoopSettings, result: StepResult, seconds: float) -> str:
    """What stands at the end of the progress line."""
    skipped = "  spike: skipped" if result.verdict == "skip" else ""
    return f"loss {result.loss:.3f}  {result.sequences * settings.seq_length / seconds:,.0f} tokens/s{skipped}"


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that becomes non-empty when SIGINT or SIGTERM arrives; a second signal acts as it did before."""
    received: list[str] = []
    previous: dict[signal.Signals, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        say(f"{received[0]}: finishing the step and saving; once more to stop without saving")
        for each, handler in previous.items():
            signal.signal(each, handler)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread: the caller handles signals
        previous.clear()
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
