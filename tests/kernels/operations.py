"""Every operation beside its formula in float64, which is written apart from all paths, and random inputs for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseling.kernels.attention import attention
from sparseling.kernels.cross_entropy import cross_entropy_sum
from sparseling.kernels.experts import experts, swiglu
from sparseling.kernels.linear import linear
from sparseling.kernels.norm import rms_norm
from sparseling.kernels.query_key_value import query_key_value
from sparseling.kernels.route import route

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Operation:
    """`kinds` says what each argument is: "activation" and "weight" may be bf16, "exact" stays fp32; these three have gradients. An
    "angle" has the dtype of the activations and no gradient. Anything else is passed as it is.

    Errors are measured against the largest value of a result, or against `natural_size` where all
    of a result may cancel to nothing.
    """

    function: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    kinds: tuple[str, ...]
    natural_size: float = 0.0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(g: torch.Generator, *shape: int) -> Tensor:
    """A weight that keeps the size of what it multiplies."""
    return torch.randn(shape, generator=g) / math.sqrt(shape[-1])


def linear_formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.transpose(0, 1) + (0 if bias is None else bias)


def linear_inputs(tokens: int, size_in: int, size_out: int, bias: bool = True, seed: int = 0) -> Inputs:
    g = generator(seed)
    x, weight = torch.randn(tokens, size_in, generator=g), matrix(g, size_out, size_in)
    return x, weight, torch.randn(size_out, generator=g) if bias else None


def swiglu_formula(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    gate = x @ gate_proj.transpose(0, 1)
    return gate * torch.sigmoid(gate) * (x @ up_proj.transpose(0, 1)) @ down_proj.transpose(0, 1)


def swiglu_inputs(tokens: int, hidden: int, width: int, seed: int = 0) -> Inputs:
    g = generator(seed)
    return torch.randn(tokens, hidden, generator=g), matrix(g, width, hidden), matrix(g, width, hidden), matrix(g, hidden, width)


def experts_formula(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """One expert after the other, each on the tokens that chose it."""
    total = torch.zeros_like(x)
    for expert in range(len(gate_up_proj)):
        rows, slots = (expert_ids == expert).nonzero(as_tuple=True)
        gate_proj, up_proj = gate_up_proj[expert].chunk(2)
        y = swiglu_formula(x[rows], gate_proj, up_proj, down_proj[expert])
        total = total.index_add(0, rows, weights[rows, slots, None] * y)
    return total


def experts_inputs(tokens: int, k: int, experts: int, hidden: int, width: int, routing: str = "random", seed: int = 0) -> Inputs:
    """`routing` "one takes all": every token chooses the same k experts, the last ones; the others stay empty."""
    g = generator(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(k).indices
    if routing == "one takes all":
        ids = torch.arange(experts - k, experts).expand(tokens, k).contiguous()
    x, weights = torch.randn(tokens, hidden, generator=g), torch.rand(tokens, k, generator=g)
    return x, ids, weights, matrix(g, experts, 2 * width, hidden), matrix(g, experts, hidden, width)


def cross_entropy_formula(hidden: Tensor, head: Tensor, labels: Tensor, z_weight: float) -> Tensor:
    valid = labels != -100
    logits = hidden[valid] @ head.transpose(0, 1)
    log_norm = logits.logsumexp(1)
    return (log_norm - logits.gather(1, labels[valid, None]).squeeze(1) + z_weight * log_norm.square()).sum()


def cross_entropy_inputs(tokens: int, hidden: int, vocabulary: int, z_weight: float = 0.0, ignored: float = 0.3, seed: int = 0) -> Inputs:
    """`ignored`: the share of labels that are -100."""
    g = generator(seed)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    labels[torch.rand(tokens, generator=g) < ignored] = -100
    return torch.randn(tokens, hidden, generator=g), 2 * matrix(g, vocabulary, hidden), labels, z_weight


def attention_formula(query: Tensor, key: Tensor, value: Tensor, first_key: Tensor | None) -> Tensor:
    """Query by query: a softmax over exactly the keys that it may look at."""
    (_, heads, queries, size), (kv_heads, keys) = query.shape, key.shape[1:3]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.einsum("bkgqd,bksd->bkgqs", grouped, key) / size**0.5
    place, own = torch.arange(keys), torch.arange(keys - queries, keys)[:, None]
    seen = (place <= own)[None] if first_key is None else (place <= own) & (place >= first_key[:, :, None])
    exponentials = torch.where(seen[:, None, None], torch.exp(scores - scores.detach().amax(-1, keepdim=True)), 0.0)
    probabilities = exponentials / exponentials.sum(-1, keepdim=True)
    return torch.einsum("bkgqs,bksd->bkgqd", probabilities, value).flatten(1, 2)


def document_starts(batch: int, keys: int, g: torch.Generator, share: float) -> Tensor:
    """[batch, keys] int32: where the document of each place starts; `share` of the places start one."""
    begins = (torch.rand(batch, keys, generator=g) < share) * torch.arange(keys)
    return begins.cummax(1).values.int()


def attention_inputs(batch: int, kv_heads: int, group: int, queries: int, cached: int, head_dim: int, documents: float | None = None,
                     seed: int = 0) -> Inputs:
    """`cached` keys stand before the queries' own; a share `documents` of the places start a document (None: no first_key)."""
    g = generator(seed)
    keys = cached + queries
    q, k, v = (torch.randn(batch, h, n, head_dim, generator=g)
               for h, n in ((kv_heads * group, queries), (kv_heads, keys), (kv_heads, keys)))
    first_key = None if documents is None else document_starts(batch, keys, g, documents)[:, cached:]
    return q, k, v, first_key


def rms_norm_formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rms_norm_inputs(rows: int, size: int, seed: int = 0) -> Inputs:
    g = generator(seed)
    return torch.randn(rows, size, generator=g), 1 + 0.3 * torch.randn(size, generator=g), 1e-6


def one_query_key_value(rows: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
                        kv_heads: int, eps: float) -> Tensor:
    """All three results in one, by head."""
    norms = None if query_weight is None or key_weight is None else (query_weight, key_weight)
    return torch.cat(query_key_value(rows, heads, kv_heads, norms, cos, sin, eps), dim=1)


def query_key_value_formula(rows: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
                            kv_heads: int, eps: float) -> Tensor:
    """Rotation as the product of complex numbers."""
    by_head = rows.unflatten(2, (heads + 2 * kv_heads, -1))
    half = cos.shape[-1] // 2
    turn = torch.complex(cos[:, :, None, :half].double(), sin[:, :, None, :half].double())
    parts: list[Tensor] = []
    for part, weight in zip(by_head.split([heads, kv_heads, kv_heads], dim=2), (query_weight, key_weight, None), strict=True):
        if weight is not None:
            part = rms_norm_formula(part, weight, eps)
        if len(parts) < 2:
            turned = torch.complex(part[..., :half], part[..., half:2 * half]) * turn
            part = torch.cat([turned.real, turned.imag, part[..., 2 * half:]], dim=-1)
        parts.append(part)
    return torch.cat(parts, dim=2).transpose(1, 2)


def query_key_value_inputs(batch: int, seq: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norms: bool = True,
                           seed: int = 0) -> Inputs:
    g = generator(seed)
    rows = torch.randn(batch, seq, (heads + 2 * kv_heads) * head_dim, generator=g)
    angles = (6.3 * torch.rand(batch, seq, rotary_dim // 2, generator=g)).repeat(1, 1, 2)
    weights = [1 + 0.3 * torch.randn(head_dim, generator=g) if norms else None for _ in range(2)]
    return rows, *weights, angles.cos(), angles.sin(), heads, kv_heads, 1e-6


def weights_and_log_norm(logits: Tensor, bias: Tensor, groups: int, kept: int, k: int, scale: float) -> Tensor:
    """Both results that have gradients in one [tokens, k + 1]."""
    _, weights, log_norm = route(logits, bias, groups, kept, k, scale)
    return torch.cat([weights, log_norm[:, None]], dim=1)


def best_experts(scores: list[float], groups: int, kept: int, k: int) -> list[int]:
    """Of one token, by sorting."""
    size = len(scores) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    of_group = sorted(members, key=lambda group: -sum(sorted(scores[e] for e in group)[-2:]))
    return sorted((e for group in of_group[:kept] for e in group), key=lambda e: -scores[e])[:k]


def route_formula(logits: Tensor, bias: Tensor, groups: int, kept: int, k: int, scale: float) -> Tensor:
    scores = 1 / (1 + torch.exp(-logits))
    biased = (scores + bias.double()).tolist()
    ids = torch.tensor([best_experts(row, groups, kept, k) for row in biased], dtype=torch.int64).view(len(logits), k)
    chosen = scores.gather(1, ids)
    weights = scale * (chosen / (chosen.sum(1, keepdim=True) + 1e-20) if k > 1 else chosen)
    return torch.cat([weights, torch.exp(logits).sum(1, keepdim=True).log()], dim=1)


def route_inputs(tokens: int, groups: int, size: int, kept: int, k: int, seed: int = 0) -> Inputs:
    """Logits of a token are distinct multiples of 1/32, so that rounding decides no choice."""
    g, experts = generator(seed), groups * size
    logits = torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)]) if tokens else torch.zeros(0, experts)
    return (logits - experts // 2) / 32.0, 0.1 * torch.randn(experts, generator=g), groups, kept, k, 2.5


LINEAR = Operation(linear, linear_formula, ("activation", "weight", "weight"))
SWIGLU = Operation(swiglu, swiglu_formula, ("activation", "weight", "weight", "weight"))
EXPERTS = Operation(experts, experts_formula, ("activation", "ids", "exact", "weight", "weight"))
CROSS_ENTROPY = Operation(cross_entropy_sum, cross_entropy_formula, ("activation", "weight", "labels", "z"), natural_size=1.0)
ATTENTION = Operation(lambda q, k, v, first_key: attention(q, k, v, None, first_key), attention_formula,
                      ("activation", "activation", "activation", "first key"), natural_size=1.0)
RMS_NORM = Operation(rms_norm, rms_norm_formula, ("activation", "weight", "eps"), natural_size=1.0)
QUERY_KEY_VALUE = Operation(one_query_key_value, query_key_value_formula, ("activation", "weight", "weight", "angle", "angle", "", "", ""),
                            natural_size=1.0)
ROUTE = Operation(weights_and_log_norm, route_formula, ("exact", "", "", "", "", ""), natural_size=1.0)

# one call of each, of sizes that are no multiples of 32 and, where results are gathered over blocks, more than one block
EVERY: dict[str, tuple[Operation, Inputs]] = {
    "linear": (LINEAR, linear_inputs(300, 70, 45, bias=False)),
    "swiglu": (SWIGLU, swiglu_inputs(70, 40, 45)),
    "experts": (EXPERTS, experts_inputs(1100, 2, 4, 40, 35, "one takes all")),
    "cross entropy": (CROSS_ENTROPY, cross_entropy_inputs(600, 40, 300, z_weight=1e-3)),
    "attention": (ATTENTION, attention_inputs(2, 2, 3, 140, 11, 40, documents=0.03)),
    "norm": (RMS_NORM, rms_norm_inputs(50, 70)),
    "query key value": (QUERY_KEY_VALUE, query_key_value_inputs(2, 30, 4, 2, 40, 20)),
    "route": (ROUTE, route_inputs(70, 3, 15, 2, 5)),
}
