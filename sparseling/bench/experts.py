"""The expert layer alone, forward and backward, against the number of experts: the work stays the same, the pieces get smaller."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError
from ..kernels.choose import describe
from ..kernels.experts import experts
from ..kernels.route import route
from ..progress import bar
from ..train.device import wait_for_device
from ..train.memory import keep_freed_memory
from ..train.peak import matmul_peak
from .measure import Candidate, Timing, time_in_turn

# --dtype: of activations, of weights
PRECISIONS = {"bf16": (torch.bfloat16, torch.bfloat16), "fp32": (torch.float32, torch.float32), "mixed": (torch.bfloat16, torch.float32)}
BIAS_STD = 0.05  # of the fixed bias on sigmoid scores: uneven loads as in a model in training
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # x, expert ids, weights, gate and up, down -> y


@dataclass(frozen=True)
class LayerShape:
    """Tokens in, elements of a token, width of one expert, experts that a token goes to."""

    tokens: int = 8192
    hidden: int = 512
    width: int = 128
    top_k: int = 8

    @property
    def flops(self) -> int:
        """Useful FLOPs of a forward and backward: three products of [hidden, width] a pair of token and expert, done three times."""
        return 3 * self.tokens * self.top_k * 6 * self.hidden * self.width


def bench_experts(shape: LayerShape, counts: Sequence[int], dtype: str, threads: int, steps: int, peer: bool = False,
                  device: str = "cpu") -> dict[str, Any]:
    """Time the layer for every number of experts in `counts`, in rounds; with `peer` also on torch's grouped_mm.

    Returns one plain object: figures and the load's largest over its mean by number of experts.
    """
    for count in counts:
        if count < shape.top_k:
            raise UsageError(f"--experts: {count} experts are fewer than the {shape.top_k} of --top-k; give more")
    torch.set_num_threads(threads)
    keep_freed_memory()
    activations, weights = PRECISIONS[dtype]
    before = matmul_peak(activations, device)
    candidates, loads = [], {}
    for count in counts:
        expert_ids, scores = uneven_routing(shape, count)
        loads[count] = torch.bincount(expert_ids.flatten(), minlength=count).max().item() * count / expert_ids.numel()
        for name, layer in {"ours": experts, **({"grouped_mm": grouped_mm_experts} if peer else {})}.items():
            step = layer_step(layer, shape, count, expert_ids, scores, activations, weights, device)
            candidates.append(Candidate(f"{count} {name}", step))
    with bar("bench experts", len(candidates) * (steps + 1)) as line:
        timings = time_in_turn(candidates, steps, line)
    peak = max(before, matmul_peak(activations, device))
    by_experts = {}
    for count in counts:
        ours: dict[str, Any] = figures(timings[f"{count} ours"], shape, peak) | {"max_over_mean_load": loads[count]}
        if peer:
            other = figures(timings[f"{count} grouped_mm"], shape, peak)
            ours |= {"grouped_mm": other, "ratio_to_grouped_mm": other["milliseconds"] / ours["milliseconds"]}
        by_experts[str(count)] = ours
    return {
        "matmul_peak_gflops": peak / 1e9, "dtype": dtype, "threads": threads, "steps": steps, "shape": dataclasses.asdict(shape),
        "kernels": describe(device), "device": device, "useful_flops": shape.flops, "by_experts": by_experts,
        "share_of_peak": {count: values["share_of_peak"] for count, values in by_experts.items()},
    }


def uneven_routing(shape: LayerShape, count: int) -> tuple[Tensor, Tensor]:
    """expert_ids and weights [tokens, top_k] of random sigmoid scores with a fixed random bias."""
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(shape.tokens, count, generator=generator)
    bias = BIAS_STD * torch.randn(count, generator=generator)
    expert_ids, weights, _ = route(logits, bias, 1, 1, shape.top_k, 1.0)
    return expert_ids, weights


def layer_step(layer: Layer, shape: LayerShape, count: int, expert_ids: Tensor, scores: Tensor, activations: torch.dtype,
               weights: torch.dtype, device: str = "cpu") -> Callable[[], float]:
    """Forward and backward to inputs, routing weights and parameters; the step returns the seconds of its forward."""
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int, dtype: torch.dtype, std: float) -> Tensor:
        return (torch.randn(*sizes, generator=generator) * std).to(device, dtype)

    x, grad = (random(shape.tokens, shape.hidden, dtype=activations, std=1.0) for _ in range(2))
    gate_up = random(count, 2 * shape.width, shape.hidden, dtype=weights, std=shape.hidden**-0.5)
    down = random(count, shape.hidden, shape.width, dtype=weights, std=shape.width**-0.5)
    expert_ids = expert_ids.to(device)
    leaves = [t.requires_grad_() for t in (x, scores.to(device, copy=True), gate_up, down)]

    def step() -> float:
        start = time.perf_counter()
        y = layer(leaves[0], expert_ids, *leaves[1:])
        wait_for_device()
        forward = time.perf_counter() - start
        y.backward(grad)
        for leaf in leaves:
            leaf.grad = None
        return forward

    return step


def grouped_mm_experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """The layer on `torch.nn.functional.grouped_mm`, tokens sorted by expert; same arguments as `kernels.experts`."""
    tokens, k = expert_ids.shape
    order = expert_ids.flatten().short().argsort(stable=True)                    # short numbers sort several times faster
    ends = torch.bincount(expert_ids.flatten(), minlength=len(gate_up_proj)).cumsum(0).int()
    rows = x.index_select(0, order // k)                                         # [pairs, hidden]
    gate, up = F.grouped_mm(rows, gate_up_proj.to(x.dtype).transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, down_proj.to(x.dtype).transpose(1, 2), offs=ends)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    by_token = y.index_select(0, position).view(tokens, k, -1)
    return torch.bmm(weights.to(x.dtype).unsqueeze(1), by_token).squeeze(1)


def figures(timing: Timing, shape: LayerShape, peak: float) -> dict[str, float]:
    """Medians over the repetitions; `peak` in FLOP/s."""
    flops = shape.flops / timing.median
    forward = statistics.median(timing.values)
    return {
        "milliseconds": 1e3 * timing.median, "forward_milliseconds": 1e3 * forward,
        "backward_milliseconds": 1e3 * (timing.median - forward), "gflops": flops / 1e9, "share_of_peak": flops / peak,
    }
