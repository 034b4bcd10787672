"""Learning rate and batch size over a stage: linear warm-up then constant, and a linear batch ramp (L2 §3.2.1)."""

from __future__ import annotations


def learning_rate_at(step: int, peak: float, warmup_steps: int) -> float:
    """Rate of optimiser step `step` (from 0): linear from peak / warmup_steps to the peak, then constant: merging stands for the decay."""
    return peak * min(1.0, (step + 1) / warmup_steps) if warmup_steps else peak


def batch_schedule(tokens: int, seq_length: int, batch_sequences: int, start_sequences: int, ramp_tokens: int) -> list[int]:
    """Sequences of every step until `tokens` are reached: linear in tokens seen from `start_sequences` to `batch_sequences`."""
    sizes, seen = [], 0
    while seen < tokens:
        progress = min(1.0, seen / ramp_tokens) if ramp_tokens else 1.0
        size = round(start_sequences + (batch_sequences - start_sequences) * progress)
        sizes.append(size)
        seen += size * seq_length
    return sizes
