"""What runs on CUDA devices, on a CUDA device: against the same float64 formulas as the CPU's kernels. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseling.bench.ours import random_batch
from sparseling.bench.shapes import Shape, sparse_config
from sparseling.kernels import cuda
from sparseling.kernels.adamw import Moments, Rates, adamw, gradient_norm
from sparseling.kernels.choose import forced_path, path_for
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.train.loop import LoopSettings, Progress, advance
from sparseling.train.objective import LossWeights, count_valid, losses
from sparseling.train.optimizer import AdamWSettings, build_optimizer

from .comparing import assert_close, cast, results, same_bits, truth
from .operations import (
    ATTENTION,
    CROSS_ENTROPY,
    EVERY,
    EXPERTS,
    ROUTE,
    Inputs,
    Operation,
    attention_inputs,
    cross_entropy_inputs,
    experts_inputs,
    route_inputs,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CALLS: dict[str, tuple[Operation, Inputs]] = EVERY | {
    "grouped experts": (EXPERTS, experts_inputs(1100, 2, 4, 48, 32, "one takes all")),
    "grouped experts, some empty": (EXPERTS, experts_inputs(150, 3, 90, 64, 32)),
    "grouped experts, one token": (EXPERTS, experts_inputs(1, 2, 5, 32, 16)),
    "grouped experts, one slot": (EXPERTS, experts_inputs(90, 1, 5, 32, 64)),
    "packed attention": (ATTENTION, attention_inputs(3, 2, 4, 200, 0, 32, documents=0.05)),
    "packed attention, heads of 128": (ATTENTION, attention_inputs(1, 1, 2, 150, 0, 128, documents=0.0)),
    "attention of single tokens": (ATTENTION, attention_inputs(2, 1, 2, 20, 0, 64, documents=1.0)),
    "cross entropy, two chunks": (CROSS_ENTROPY, cross_entropy_inputs(2100, 48, 500, z_weight=1e-3)),
    "cross entropy, no label": (CROSS_ENTROPY, cross_entropy_inputs(20, 32, 50, ignored=1.0)),
    "route, no groups": (ROUTE, route_inputs(500, 1, 256, 1, 8)),
}
every_call = pytest.mark.parametrize("name", list(CALLS))
SHAPE = Shape(layers=3, hidden=64, experts=16, width=32, top_k=4, vocab=512, seq_length=64, sequences=8)


def on_gpu(inputs: Inputs) -> Inputs:
    return tuple(v.cuda() if isinstance(v, Tensor) else v for v in inputs)


def gpu_results(operation: Operation, inputs: Inputs) -> list[Tensor]:
    """Output and gradients, back on the CPU."""
    return [t.cpu() for t in results(operation, on_gpu(inputs))]


@every_call
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_lies_within_a_few_roundings_of_the_formula(name: str, weight_dtype: torch.dtype) -> None:
    operation, inputs = CALLS[name]
    inputs = cast(operation, inputs, torch.bfloat16, weight_dtype)
    assert path_for(inputs[0].cuda()) == "cuda"
    for got, want in zip(gpu_results(operation, inputs), truth(operation, inputs), strict=True):
        assert_close(got, want, 2**-6, operation.natural_size, mean=2**-9)


@every_call
def test_fp32_equals_the_formula(name: str) -> None:
    operation, inputs = CALLS[name]
    for got, want in zip(gpu_results(operation, inputs), truth(operation, inputs), strict=True):
        assert_close(got, want, 1e-5, operation.natural_size)


@pytest.mark.parametrize("name", [name for name in CALLS if "attention" not in name])  # flash attention adds up dq as it comes
def test_results_have_the_same_bits_run_to_run(name: str) -> None:
    operation, inputs = CALLS[name]
    inputs = cast(operation, inputs, torch.bfloat16, torch.float32)
    first = gpu_results(operation, inputs)
    assert all(same_bits(first, gpu_results(operation, inputs)) for _ in range(3))


def test_aligned_experts_take_the_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    grouped = cuda.experts
    monkeypatch.setattr(cuda, "experts", lambda *arguments: calls.append(arguments) or grouped(*arguments))
    operation, inputs = CALLS["grouped experts"]
    operation.function(*on_gpu(cast(operation, inputs, torch.bfloat16, torch.float32)))
    assert len(calls) == 1


def test_adamw_equals_the_reference() -> None:
    g = torch.Generator().manual_seed(3)
    parameters, grads = ([torch.randn(n, 7, generator=g) for n in (3, 50)] for _ in range(2))
    want, got = [p.clone() for p in parameters], [p.cuda() for p in parameters]
    rates = Rates(0.01, 0.9, 0.95, 1e-8, 0.5)
    moments = {device: [Moments.zero(p) for p in tensors] for device, tensors in (("cpu", want), ("cuda", got))}
    for _ in range(3):
        with forced_path("reference"):
            adamw(want, grads, moments["cpu"], [0.1, 0.0], rates)
        adamw(got, [grad.cuda() for grad in grads], moments["cuda"], [0.1, 0.0], rates)
    assert gradient_norm([grad.cuda() for grad in grads]) == pytest.approx(gradient_norm(grads))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def model_gradients(device: str, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a small model with MTP on packed documents."""
    model = initialize(LingForCausalLM(sparse_config(SHAPE).replace(num_nextn_predict_layers=1, initializer_range=0.06)), 1).to(device)
    batch = random_batch(SHAPE).to(device)
    documents = (torch.arange(SHAPE.seq_length, device=device) // 25).expand_as(batch.input_ids).contiguous()
    valid = count_valid(batch.labels, documents, 1)
    part = losses(model, batch.input_ids, batch.labels, documents, LossWeights(), valid, dtype)
    part.total.backward()
    return part.total.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def test_a_models_loss_and_gradients_equal_the_cpus() -> None:
    with forced_path("torch"):
        loss, grads = model_gradients("cpu", torch.float32)
        rounded = model_gradients("cpu", torch.bfloat16)[1]
    exact, low = model_gradients("cuda", torch.float32), model_gradients("cuda", torch.bfloat16)
    assert exact[0] == pytest.approx(loss, rel=1e-5) and low[0] == pytest.approx(loss, rel=5e-3)
    for name, want in grads.items():
        assert (exact[1][name] - want).norm() <= 1e-4 * want.norm() + 1e-9, name
        assert (low[1][name] - want).norm() <= 1.5 * (rounded[name] - want).norm() + 1e-3 * want.norm() + 1e-7, name


def test_training_steps_learn_on_a_gpu_as_on_a_cpu() -> None:
    def last_loss(device: str, dtype: torch.dtype) -> float:
        model = initialize(LingForCausalLM(sparse_config(SHAPE)), 0).to(device)
        settings = LoopSettings(0, SHAPE.seq_length, (), AdamWSettings(3e-3), micro_batch_sequences=4, dtype=dtype)
        optimizer, progress = build_optimizer(model, settings.optimizer), Progress()
        batch = random_batch(SHAPE)
        for _ in range(20):
            result = advance(model, optimizer, settings, progress, lambda first, sequences: batch, SHAPE.sequences)
        assert int(result.counts.sum()) == SHAPE.tokens * SHAPE.top_k * (SHAPE.layers - 1)
        return result.loss

    want = last_loss("cpu", torch.float32)
    assert want < 5.5 and last_loss("cuda", torch.bfloat16) == pytest.approx(want, rel=0.03)
