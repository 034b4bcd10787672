"""AdamW and the gradients' norm, beside torch.optim.AdamW in float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseling.kernels.adamw import Moments, Rates, adamw, gradient_norm

from .comparing import LAYOUTS, few, threads
from .operations import generator

RATES = Rates(learning_rate=3e-2, beta1=0.9, beta2=0.95, epsilon=1e-8, grad_scale=0.3)
SIZES = [1, 5, 16, 33, 1000, 16384, 40001]


def parameters_of(sizes: list[int], seed: int = 0) -> list[Tensor]:
    return [torch.randn(size, generator=generator(seed + n)) for n, size in enumerate(sizes)]


def by_torch(parameters: list[Tensor], gradients: list[list[Tensor]], decays: list[float]) -> list[Tensor]:
    """torch.optim.AdamW in float64, for each parameter by itself."""
    wide = [p.double().clone().requires_grad_() for p in parameters]
    for p, decay, of_p in zip(wide, decays, zip(*gradients, strict=True), strict=True):
        optimizer = torch.optim.AdamW([p], lr=RATES.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
        for grad in of_p:
            p.grad = 0.3 * grad.double()
            optimizer.step()
    return [p.detach() for p in wide]


@few(15)
@given(sizes=st.lists(st.sampled_from([0, *SIZES]), min_size=1, max_size=5), cores=st.integers(1, 3),
       layout=st.sampled_from(sorted(LAYOUTS)), seed=st.integers(0, 99))
def test_steps_equal_torch_in_float64(path: str, sizes: list[int], cores: int, layout: str, seed: int) -> None:
    parameters = parameters_of(sizes, seed)
    gradients = [[torch.randn(size, generator=generator(7 * seed + step)) * 10.0**step for size in sizes] for step in range(-2, 2)]
    decays = [0.1 * (n % 2) for n in range(len(sizes))]
    want = by_torch(parameters, gradients, decays)
    moments = [Moments.zero(p) for p in parameters]
    with threads(cores):
        for grads in gradients:
            adamw(parameters, [LAYOUTS[layout](grad) for grad in grads], moments, decays, RATES)
    assert all(float(own.step) == 4 for own in moments)
    for got, expected in zip(parameters, want, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6)


@few(25)
@given(sizes=st.lists(st.sampled_from([0, *SIZES]), max_size=6), cores=st.integers(1, 3), scale=st.sampled_from([1e-15, 1.0, 1e15]))
def test_the_norm_equals_that_of_one_long_vector(path: str, sizes: list[int], cores: int, scale: float) -> None:
    grads = [scale * grad for grad in parameters_of(sizes)]
    want = torch.cat([torch.zeros(1), *grads]).double().norm().item()
    with threads(cores):
        assert gradient_norm(grads) == pytest.approx(want, rel=1e-5)


def test_bits_do_not_depend_on_threads(variant: str) -> None:
    results = []
    for cores in (1, 2, 3, 3):
        parameters, moments = parameters_of(SIZES), [Moments.zero(p) for p in parameters_of(SIZES)]
        with threads(cores):
            norm = gradient_norm(parameters_of(SIZES, 50))
            adamw(parameters, parameters_of(SIZES, 50), moments, [0.1] * len(SIZES), RATES)
        results.append((norm, torch.cat(parameters)))
    assert all(norm == results[0][0] and torch.equal(weights, results[0][1]) for norm, weights in results)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 20, 32])
def test_a_broken_gradient_shows_in_the_norm(path: str, value: float, place: int) -> None:
    grad = torch.zeros(33)
    grad[place] = value
    assert not math.isfinite(gradient_norm([torch.ones(5), grad]))


def test_misfitting_gradients_are_refused_and_nothing_is_changed(variant: str) -> None:
    parameters = [torch.ones(3), torch.ones(4, 2)]
    moments = [Moments.zero(p) for p in parameters]
    with pytest.raises(ValueError, match="do not fit"):
        adamw(parameters, [torch.ones(3), torch.ones(2, 4)], moments, [0.0, 0.0], RATES)
    assert all(torch.equal(p, torch.ones_like(p)) for p in parameters) and all(float(own.step) == 0 for own in moments)


def test_parameters_that_are_not_contiguous_are_refused(path: str) -> None:
    parameter = torch.ones(6, 5).t()
    with pytest.raises(ValueError, match="not contiguous"):
        adamw([parameter], [torch.ones(5, 6)], [Moments.zero(parameter)], [0.1], RATES)


@pytest.mark.parametrize(("beta1", "beta2"), [(0, 0.999), (0.5, 0.99999), (0.99, 0)])
def test_other_betas_equal_torch_in_float64(path: str, beta1: float, beta2: float) -> None:
    rates = dataclasses.replace(RATES, beta1=beta1, beta2=beta2)
    parameter, grads = torch.randn(40, generator=generator(0)), [torch.randn(40, generator=generator(n)) for n in (1, 2, 3)]
    wide = parameter.double().requires_grad_()
    optimizer = torch.optim.AdamW([wide], lr=rates.learning_rate, betas=(float(beta1), float(beta2)), eps=rates.epsilon, weight_decay=0.1)
    moments = [Moments.zero(parameter)]
    for grad in grads:
        wide.grad = rates.grad_scale * grad.double()
        optimizer.step()
        adamw([parameter], [grad], moments, [0.1], rates)
    torch.testing.assert_close(parameter.double(), wide.detach(), rtol=1e-5, atol=2e-6)


def test_autograd_knows_that_the_parameter_has_changed(variant: str) -> None:
    parameter = torch.ones(4, requires_grad=True)
    loss = parameter.square().sum()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        adamw([parameter], [torch.ones(4)], [Moments.zero(parameter)], [0.0], RATES)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_zero_gradient_decays_only(path: str) -> None:
    parameter = torch.ones(40)
    adamw([parameter], [torch.zeros(40)], [Moments.zero(parameter)], [0.5], RATES)
    torch.testing.assert_close(parameter, torch.full((40,), 1 - 0.5 * 3e-2))
