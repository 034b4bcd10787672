"""The definition of correct: plain PyTorch, autograd for the backward, no thought of speed.

Every fast path of this folder is tested against these functions, forward and backward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Routed SwiGLU experts: `sum_j weights[t, j] * E_{expert_ids[t, j]}(x[t])`, summed in fp32, in the dtype of `x`.

    x [tokens, hidden]; expert_ids, weights [tokens, k] (int64, fp32); gate_up_proj [experts, 2 * width, hidden] (gate rows, then
    up rows); down_proj [experts, hidden, width]. L2 §2.2; cast order of the public implementation.
    """
    slots = []
    for slot in range(expert_ids.shape[1]):
        gate_up = torch.einsum("td,tfd->tf", x, gate_up_proj[expert_ids[:, slot]])
        gate, up = gate_up.chunk(2, dim=-1)
        y = torch.einsum("tf,tdf->td", F.silu(gate) * up, down_proj[expert_ids[:, slot]])
        slots.append(y.float() * weights[:, slot, None])
    return torch.stack(slots, dim=1).sum(dim=1).to(x.dtype)


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Sum over valid labels of the cross entropy in nats: hidden [tokens, hidden], head [vocab, hidden], labels [tokens], -100 = none."""
    return F.cross_entropy(F.linear(hidden, head).float(), labels, ignore_index=-100, reduction="sum")


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v with the public cast order: scores in the input dtype, softmax in fp32, cast back.

    query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim], query head j uses kv head
    j // (heads / kv_heads); mask [batch, 1, queries, keys] bool, True = may look, None = causal (the queries are the last positions).
    """
    repeats, (queries, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(query.shape[-1])       # [batch, heads, queries, keys]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    probabilities = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=torch.float32)
    return torch.matmul(probabilities.to(query.dtype), value)
