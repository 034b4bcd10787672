"""Loss spikes: skip the step, put its batch back later, and if it spikes again take it with a lower learning rate.

The rule is that of L1 §3.4.4 and §6.1 (kept by L2 §5.3.5); the papers give no thresholds, those here are ours.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["take", "skip", "take slowly"]


@dataclass(frozen=True)
class SpikeRule:
    """When a step is a spike. `window` accepted steps are remembered; nothing is judged before `window // 2` of them."""

    window: int = 64
    loss_deviations: float = 8.0
    loss_margin: float = 0.25
    grad_norm_factor: float = 8.0
    delay_steps: int = 32
    slow_factor: float = 0.1
    skips_in_a_row: int = 3


@dataclass
class SpikeState:
    """What the rule remembers; part of every checkpoint. `postponed` holds [due step, first sample index, sequences]."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    postponed: list[list[int]] = field(default_factory=list)
    skipped_in_a_row: int = 0
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def is_spike(rule: SpikeRule, state: SpikeState, loss: float, grad_norm: float) -> bool:
    """Whether loss (nats) or gradient norm stand far above the median of the accepted steps; never-finite values always do."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return True
    if len(state.losses) < rule.window // 2:
        return False
    median = statistics.median(state.losses)
    spread = 1.4826 * statistics.median(abs(x - median) for x in state.losses)
    if loss > median + max(rule.loss_margin, rule.loss_deviations * spread):
        return True
    return grad_norm > rule.grad_norm_factor * statistics.median(state.grad_norms)


def judge(rule: SpikeRule, state: SpikeState, loss: float, grad_norm: float, second_time: bool) -> Verdict:
    """What to do with a step, before the update. A batch that comes back, or a long row of skips, is taken slowly, not skipped again."""
    if not is_spike(rule, state, loss, grad_norm):
        return "take"
    if math.isfinite(loss) and math.isfinite(grad_norm) and (second_time or state.skipped_in_a_row >= rule.skips_in_a_row):
        return "take slowly"
    return "skip"


def remember(rule: SpikeRule, state: SpikeState, verdict: Verdict, step: int, batch: tuple[int, int], loss: float, grad_norm: float,
             second_time: bool, seed: int) -> None:
    """Update the state after a step; `batch` is (first sample index, sequences). A skipped first-timer comes back after a random delay."""
    if verdict == "skip":
        state.skipped += 1
        state.skipped_in_a_row += 1
        if not second_time:
            due = step + rule.delay_steps + random.Random(f"{seed} {step}").randrange(rule.delay_steps)
            state.postponed.append([due, *batch])
        return
    if verdict == "take":  # a slow step does not end the row: a lasting change of level is taken slowly until the medians are there
        state.skipped_in_a_row = 0
    # A slow step's loss is not normal, but after a real change of level the medians must be able to follow.
    state.losses = [*state.losses, loss][-rule.window:]
    state.grad_norms = [*state.grad_norms, grad_norm][-rule.window:]


def due_batch(state: SpikeState, step: int) -> tuple[int, int] | None:
    """Take out a postponed batch that is due at `step`: (first sample index, sequences), or None."""
    for n, (due, first, sequences) in enumerate(state.postponed):
        if due <= step:
            del state.postponed[n]
            return first, sequences
    return None
