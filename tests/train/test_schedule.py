"""Warm-up then constant; the batch ramp; which parameters are decayed."""

from __future__ import annotations

import pytest
import torch

from sparseling.config import preset
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.train.optimizer import AdamWSettings, build_optimizer
from sparseling.train.schedule import batch_schedule, learning_rate_at


def test_learning_rate_rises_linearly_then_never_falls() -> None:
    rates = [learning_rate_at(s, 2.0, 4) for s in range(100)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and set(rates[4:]) == {2.0}
    assert learning_rate_at(0, 2.0, 0) == 2.0


@pytest.mark.parametrize(
    ("tokens", "seq", "full", "start", "ramp"),
    [(100_000, 64, 16, 16, 0), (100_000, 64, 16, 2, 50_000), (1, 64, 16, 4, 0), (10**6, 128, 32, 8, 10**7)],
)
def test_batch_ramp_reaches_the_tokens_with_the_last_step_and_never_shrinks(
    tokens: int, seq: int, full: int, start: int, ramp: int
) -> None:
    sizes = batch_schedule(tokens, seq, full, start, ramp)
    assert sum(sizes) * seq >= tokens > sum(sizes[:-1]) * seq
    assert sizes == sorted(sizes) and max(sizes) <= full
    assert sizes[0] == (start if ramp else full)
    seen = 0
    for size in sizes:
        assert size == round(start + (full - start) * min(1.0, seen / ramp)) if ramp else size == full
        seen += size * seq


def test_only_matrices_are_decayed() -> None:
    model = initialize(LingForCausalLM(preset("pico")), 0)
    decayed, free = build_optimizer(model, AdamWSettings(1e-3)).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decayed["params"]) and all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_adamw_step_equals_the_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    model = torch.nn.Module()
    model.weight = weight
    optimizer = build_optimizer(model, AdamWSettings(0.1))
    want, m, v = weight.detach().double().clone(), 0.0, 0.0
    for t in range(1, 4):
        grad = torch.tensor([[0.3 * t, -0.1]])
        weight.grad = grad.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * grad.double(), 0.95 * v + 0.05 * grad.double() ** 2
        want = want * (1 - 0.1 * 0.1) - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    assert torch.allclose(weight.detach().double(), want, atol=1e-6)
