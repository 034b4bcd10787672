"""Running an operation forward and backward, and measuring how far results lie apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from .operations import Inputs, Operation, generator

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t.contiguous(),
    "sliced": lambda t: torch.nn.functional.pad(t, [1, 6])[..., 1:-6],
    "reversed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "spread": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


def few(examples: int) -> settings:
    """The same examples every time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors start out as NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def cast(operation: Operation, inputs: Inputs, dtype: torch.dtype, weight_dtype: torch.dtype) -> Inputs:
    dtypes = {"activation": dtype, "angle": dtype, "weight": weight_dtype}
    return tuple(v.to(dtypes.get(kind, v.dtype)) if isinstance(v, Tensor) else v for v, kind in zip(inputs, operation.kinds, strict=True))


def has_gradient(value: Any, kind: str) -> bool:
    return isinstance(value, Tensor) and kind in ("activation", "weight", "exact")


def leaves(operation: Operation, inputs: Inputs, layout: str = "dense") -> Inputs:
    """The inputs, those with gradients as fresh leaves of that memory layout."""
    return tuple(LAYOUTS[layout](v.detach()).requires_grad_() if has_gradient(v, kind) else v
                 for v, kind in zip(inputs, operation.kinds, strict=True))


def gradients(output: Tensor, inputs: Inputs, layout: str = "dense") -> list[Tensor]:
    """Of all leaves among the inputs, for a random gradient of the output."""
    grad = torch.randn(output.shape, generator=generator(17)).to(output)  # its dtype and device
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    return list(torch.autograd.grad(output, wanted, LAYOUTS[layout](grad) if grad.dim() else grad))


def results(operation: Operation, inputs: Inputs, layout: str = "dense", grad_layout: str = "dense", cores: int = 1) -> list[Tensor]:
    """Output and gradients by the path in force."""
    inputs = leaves(operation, inputs, layout)
    with threads(cores), poisoned_memory():
        output = operation.function(*inputs)
        return [output.detach(), *gradients(output, inputs, grad_layout)]


@threads(1)
def truth(operation: Operation, inputs: Inputs) -> list[Tensor]:
    """Output and gradients by the formula in float64. Weights are rounded to the dtype of the activations first, as all paths do."""
    rounded = cast(operation, inputs, inputs[0].dtype, inputs[0].dtype)
    wide = leaves(operation, cast(operation, rounded, torch.float64, torch.float64))
    wide = tuple(v.detach().double().requires_grad_() if kind == "exact" else v for v, kind in zip(wide, operation.kinds, strict=True))
    output = operation.formula(*wide)
    grad = torch.randn(output.shape, generator=generator(17)).to(inputs[0].dtype if output.dim() else torch.float32)
    wanted = [v for v in wide if isinstance(v, Tensor) and v.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad.double())]


def assert_close(got: Tensor, want: Tensor, relative: float, natural_size: float = 0.0, mean: float | None = None) -> None:
    """The largest error, and the mean one of a result of some size, relative to the largest value."""
    assert got.shape == want.shape
    if want.numel() == 0:
        return
    size = max(float(want.abs().max()), natural_size)
    error = (got.double() - want).abs()
    assert float(error.max()) <= relative * size
    assert mean is None or error.numel() < 64 or float(error.mean()) <= mean * size


def assert_equals_formula(operation: Operation, inputs: Inputs, layout: str = "dense", grad_layout: str = "dense",
                          cores: int = 1) -> None:
    for got, want in zip(results(operation, inputs, layout, grad_layout, cores), truth(operation, inputs), strict=True):
        assert_close(got, want, 1e-5, operation.natural_size)


def assert_within_bf16(operation: Operation, inputs: Inputs, weight_dtype: torch.dtype, cores: int = 1) -> None:
    """bf16 activations: each result has its own input's dtype, and lies within a few roundings of the formula."""
    inputs = cast(operation, inputs, torch.bfloat16, weight_dtype)
    got = results(operation, inputs, cores=cores)
    expected = [v.dtype for v, kind in zip(inputs, operation.kinds, strict=True) if has_gradient(v, kind)]
    assert [t.dtype for t in got[1:]] == expected
    assert got[0].dtype == (torch.bfloat16 if got[0].dim() else torch.float32)
    for result, want in zip(got, truth(operation, inputs), strict=True):
        assert_close(result, want, 2**-6, operation.natural_size, mean=2**-9)


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
