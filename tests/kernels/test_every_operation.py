"""What holds for every operation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseling.kernels.choose import forced_path, path_for

from .comparing import LAYOUTS, assert_close, cast, gradients, leaves, results, same_bits, truth
from .operations import CROSS_ENTROPY, EVERY, EXPERTS, Inputs, Operation, cross_entropy_inputs, experts_inputs

every_operation = pytest.mark.parametrize("name", list(EVERY))
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


@every_operation
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("cores", [1, 2, 3])
def test_results_have_the_same_bits_run_to_run(variant: str, name: str, dtypes: tuple[torch.dtype, torch.dtype], cores: int) -> None:
    operation, inputs = EVERY[name]
    inputs = cast(operation, inputs, *dtypes)
    first = results(operation, inputs, cores=cores)
    assert same_bits(first, results(operation, inputs, cores=cores))


@every_operation
def test_variants_and_paths_agree(variant: str, name: str) -> None:
    operation, inputs = EVERY[name]
    got = results(operation, inputs)
    with forced_path("torch"):
        for a, b in zip(got, results(operation, inputs), strict=True):
            assert_close(a, b.double(), 2e-5, operation.natural_size)


@every_operation
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "dense"])
def test_the_layout_in_memory_changes_no_bit(variant: str, name: str, layout: str) -> None:
    operation, inputs = EVERY[name]
    of_inputs = "sliced" if name == "query key value" else layout
    assert same_bits(results(operation, inputs, of_inputs, layout), results(operation, inputs))


@every_operation
def test_an_expanded_gradient_is_a_gradient(variant: str, name: str) -> None:
    operation, inputs = EVERY[name]
    inputs = leaves(operation, inputs)
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    output = operation.function(*inputs)
    expanded = torch.autograd.grad(output.sum(), wanted, retain_graph=True)
    assert same_bits(list(expanded), list(torch.autograd.grad(output, wanted, torch.ones_like(output))))


@every_operation
def test_a_second_backward_of_a_kept_graph_gives_the_same_bits(variant: str, name: str) -> None:
    operation, inputs = EVERY[name]
    inputs = leaves(operation, inputs)
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    total = operation.function(*inputs).square().sum()
    first, second = (list(torch.autograd.grad(total, wanted, retain_graph=True)) for _ in range(2))
    assert same_bits(first, second)


@every_operation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_result_is_the_same_and_has_no_graph(path: str, name: str, dtype: torch.dtype) -> None:
    operation, inputs = EVERY[name]
    inputs = leaves(operation, cast(operation, inputs, dtype, torch.float32))
    want = operation.function(*inputs)
    with torch.no_grad():
        got = operation.function(*inputs)
    assert want.grad_fn is not None and got.grad_fn is None and not got.requires_grad and torch.equal(got, want)


@every_operation
def test_inputs_are_left_as_they_were(variant: str, name: str) -> None:
    operation, inputs = EVERY[name]
    copies = [v.clone() if isinstance(v, Tensor) else v for v in inputs]
    results(operation, inputs)
    assert all(torch.equal(a, b) for a, b in zip(copies, inputs, strict=True) if isinstance(a, Tensor))


def all_broken(operation: Operation, inputs: Inputs) -> Inputs:
    return tuple(torch.full_like(v, float("nan")) if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_values_of_one_call_never_reach_the_next(variant: str, dtype: torch.dtype) -> None:
    calls = {name: (operation, cast(operation, inputs, dtype, dtype)) for name, (operation, inputs) in EVERY.items()}
    for call in calls.values():
        clean = results(*call)
        for broken in (calls["cross entropy"], calls["experts"], call):  # the first two work with the most memory
            results(broken[0], all_broken(*broken))
        assert same_bits(results(*call), clean)


def unpoisoned(operation: Operation, inputs: Inputs) -> list[Tensor]:
    """Output and gradients, without settings of the process."""
    inputs = leaves(operation, inputs)
    output = operation.function(*inputs)
    return [output.detach(), *gradients(output, inputs)]


def test_two_python_threads_may_compute_at_once(variant: str) -> None:
    want = [truth(*call) for call in EVERY.values()]

    def all_results(_: int) -> list[list[Tensor]]:
        return [[t.double() for t in unpoisoned(*call)] for call in EVERY.values()]

    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(all_results, range(4)):
            for (operation, _), a, b in zip(EVERY.values(), got, want, strict=True):
                for result, expected in zip(a, b, strict=True):
                    assert_close(result, expected, 1e-5, operation.natural_size)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "route"])  # whose logits are fp32 always
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-5), (torch.float16, 2**-6)])
def test_float64_and_float16_take_the_path_of_pytorch(variant: str, name: str, dtype: torch.dtype, relative: float) -> None:
    operation, inputs = EVERY[name]
    inputs = cast(operation, inputs, dtype, dtype)
    assert path_for(inputs[0]) == "torch"
    got = results(operation, inputs)
    assert got[0].dtype == dtype or got[0].dim() == 0
    for a, b in zip(got, truth(operation, inputs), strict=True):
        assert_close(a, b, relative, operation.natural_size)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float64])
@every_operation
def test_fp32_activations_take_weights_of_any_dtype(variant: str, name: str, weight_dtype: torch.dtype) -> None:
    operation, inputs = EVERY[name]
    inputs = cast(operation, inputs, torch.float32, weight_dtype)
    got = results(operation, inputs)
    for a, b in zip(got, truth(operation, inputs), strict=True):
        assert_close(a, b, 1e-5 if a.dtype != torch.bfloat16 else 2**-8, operation.natural_size)


class Recorder:
    """Stands in for `call` of a module and keeps the arguments of every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        self.calls: list[tuple[Any, ...]] = []
        loaded = import_module(f"sparseling.kernels.{module}")
        self.call = loaded.call
        monkeypatch.setattr(loaded, "call", self)

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)
        self.call(*arguments)


def test_experts_keep_nothing_without_gradients(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, inputs = Recorder(monkeypatch, "experts"), experts_inputs(20, 2, 4, 40, 20)
    EXPERTS.function(*inputs)
    with torch.no_grad():
        EXPERTS.function(*leaves(EXPERTS, inputs))
    EXPERTS.function(*leaves(EXPERTS, inputs))
    assert [arguments[-2] is None for arguments in recorder.calls] == [True, True, False]


def test_cross_entropy_computes_no_gradients_where_none_are_wanted(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, inputs = Recorder(monkeypatch, "cross_entropy"), cross_entropy_inputs(20, 40, 20)
    CROSS_ENTROPY.function(*inputs)
    with torch.no_grad():
        CROSS_ENTROPY.function(*leaves(CROSS_ENTROPY, inputs))
    CROSS_ENTROPY.function(*leaves(CROSS_ENTROPY, inputs))
    assert [arguments[-2:] == (None, None) for arguments in recorder.calls] == [True, True, False]


@every_operation
def test_the_cpu_path_calls_the_kernels(variant: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {"swiglu": "experts", "cross entropy": "cross_entropy", "query key value": "query_key_value"}
    recorder = Recorder(monkeypatch, modules.get(name, name))
    results(*EVERY[name])
    assert len(recorder.calls) == {"linear": 3, "cross entropy": 1}.get(name, 2)


@every_operation
def test_second_derivatives_are_refused(variant: str, name: str) -> None:
    operation, inputs = EVERY[name]
    inputs = leaves(operation, inputs)
    wanted = [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]
    first = torch.autograd.grad(operation.function(*inputs).square().sum(), wanted, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|used in the graph"):
        torch.autograd.grad(sum(g.square().sum() for g in first), wanted)


@pytest.mark.parametrize("name", ["swiglu", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("others", [torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_one_call_may_have_several_dtypes(variant: str, name: str, dtype: torch.dtype, others: torch.dtype) -> None:
    operation, inputs = EVERY[name]
    *rest, last = cast(operation, inputs, dtype, torch.float32 if others == torch.bfloat16 else torch.bfloat16)
    mixed = (*rest, last.to(others))
    got = results(operation, mixed)
    assert got[-1].dtype == others and got[-2].dtype == rest[-1].dtype
    for a, b in zip(got, truth(operation, mixed), strict=True):
        assert_close(a, b, 2**-6 if torch.bfloat16 in (dtype, a.dtype) else 1e-5, operation.natural_size)
