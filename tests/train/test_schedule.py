"""Warm-up then constant; the batch ramp; which parameters are decayed."""

from __future__ import annotations

import pytest
import torch

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


def model_of(*parameters: torch.nn.Parameter) -> torch.nn.Module:
    model = torch.nn.Module()
    for number, parameter in enumerate(parameters):
        model.register_parameter(f"p{number}", parameter)
    return model


def test_only_matrices_are_decayed() -> None:
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(model_of(matrix, vector), AdamWSettings(1e-3))
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.5, optimizer.gradient_norm())
    assert torch.equal(matrix.detach(), torch.full((2, 2), 1 - 0.5 * 0.1)) and torch.equal(vector.detach(), torch.ones(2))


def test_adamw_with_clipping_equals_the_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer(model_of(weight), AdamWSettings(0.1))
    want, m, v = weight.detach().double().clone(), 0.0, 0.0
    for t in range(1, 6):
        grad = torch.tensor([[0.3 * t, -0.1]])
        weight.grad = grad.clone()
        norm = optimizer.gradient_norm()
        assert norm == pytest.approx(grad.double().norm().item())
        optimizer.step(0.1, norm)
        clipped = grad.double() * min(1.0, 1 / (grad.double().norm() + 1e-6))
        m, v = 0.9 * m + 0.1 * clipped, 0.95 * v + 0.05 * clipped**2
        want = want * (1 - 0.1 * 0.1) - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    assert torch.allclose(weight.detach().double(), want, atol=1e-6)


def test_parameters_without_a_gradient_are_left_alone() -> None:
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(model_of(used, unused), AdamWSettings(0.1))
    used.grad = torch.ones(3)
    optimizer.step(0.1, 1.0)
    assert torch.equal(unused.detach(), torch.ones(3)) and not torch.equal(used.detach(), torch.ones(3))
    assert {name: float(tensor) for name, tensor in optimizer.tensors().items() if name.endswith("step")} == {"p0.step": 1, "p1.step": 0}
    optimizer.zero_grad()
    assert used.grad is None and optimizer.gradient_norm() == 0
