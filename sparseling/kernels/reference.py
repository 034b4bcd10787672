"""The definition of correct: plain PyTorch, autograd for the backward, no thought of speed.

Every fast path of this folder is tested against these functions, forward and backward. Weights are cast to the dtype of the
activations first: parameters may stay fp32 while a model computes in bf16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def swiglu(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)): gate_proj, up_proj [width, hidden], down_proj [hidden, width]."""
    return linear(F.silu(linear(x, gate_proj)) * linear(x, up_proj), down_proj)


def choose_experts(biased_scores: Tensor, groups: int, groups_kept: int, k: int) -> Tensor:
    """Ids [tokens, k] of the best experts, best first, of the best groups; a group's score is the sum of its two best experts.

    biased_scores [tokens, experts]. Rejected groups get -inf, not 0: biased scores may be negative.
    """
    if groups > 1:
        tokens, experts = biased_scores.shape
        grouped = biased_scores.view(tokens, groups, experts // groups)
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)                # [tokens, groups]
        kept = group_scores.topk(groups_kept, dim=-1, sorted=False).indices
        rejected = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept, False)
        biased_scores = grouped.masked_fill(rejected.unsqueeze(-1), float("-inf")).view(tokens, experts)
    return biased_scores.topk(k, dim=-1).indices


def route(logits: Tensor, expert_bias: Tensor, groups: int, groups_kept: int, k: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Expert ids [tokens, k] (int64), their weights [tokens, k], and the logsumexp of the logits [tokens], which the z-loss squares.

    logits [tokens, experts]. The bias [experts] chooses and does not weigh; weights are sigmoid scores, normalised to sum to
    `scale` where k > 1 (L2 §2.2; DS3 eq. 12 to 16).
    """
    scores = torch.sigmoid(logits)
    expert_ids = choose_experts(scores.detach() + expert_bias, groups, groups_kept, k)
    chosen = scores.gather(1, expert_ids)
    if k > 1:
        chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return expert_ids, chosen * scale, logits.logsumexp(-1)


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Routed SwiGLU experts: `sum_j weights[t, j] * E_{expert_ids[t, j]}(x[t])`, summed in fp32, in the dtype of `x`.

    x [tokens, hidden]; expert_ids, weights [tokens, k] (int64, fp32); gate_up_proj [experts, 2 * width, hidden] (gate rows, then
    up rows); down_proj [experts, hidden, width]. L2 §2.2; cast order of the public implementation.
    """
    gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
    slots = []
    for slot in range(expert_ids.shape[1]):
        gate_up = torch.einsum("td,tfd->tf", x, gate_up_proj[expert_ids[:, slot]])
        gate, up = gate_up.chunk(2, dim=-1)
        y = torch.einsum("tf,tdf->td", F.silu(gate) * up, down_proj[expert_ids[:, slot]])
        slots.append(y.float() * weights[:, slot, None])
    return torch.stack(slots, dim=1).sum(dim=1).to(x.dtype)


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor, z_weight: float = 0.0) -> Tensor:
    """Sum over valid labels, in nats, of the cross entropy plus `z_weight` times the square of the log normaliser.

    hidden [tokens, hidden], head [vocab, hidden], labels [tokens], -100 = none.
    """
    logits = F.linear(hidden, head.to(hidden.dtype)).float()
    z = logits.logsumexp(-1)[labels >= 0].square().sum()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") + z_weight * z


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) in fp32, cast back to the dtype of x, then times the weight in that dtype (L2 §2.1)."""
    return weight.to(x.dtype) * F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim elements of each head of x [batch, heads, seq, head_dim]; the rest passes unchanged.

    cos, sin [batch, seq, rotary_dim], written twice (rotate-half layout).
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)                                    # [batch, 1, seq, rotary_dim]
    turned, passed = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    half_turned = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * cos + half_turned * sin, passed], dim=-1)


def query_key_value(rows: Tensor, heads: int, kv_heads: int, norms: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor,
                    eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Split the fused projection [batch, seq, (heads + 2 kv_heads) * head_dim] (all queries, all keys, all values), norm each query and
    key head (weights `norms`, unless None), rotate both. Three [batch, heads or kv_heads, seq, head_dim] (L2 §2.1)."""
    batch, seq, _ = rows.shape
    by_head = rows.view(batch, seq, heads + 2 * kv_heads, -1).transpose(1, 2)
    query, key, value = by_head.split([heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        query, key = rms_norm(query, norms[0], eps), rms_norm(key, norms[1], eps)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, first_key: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v with the public cast order: scores in the input dtype, softmax in fp32, cast back.

    query [batch, heads, queries, head_dim]; key, value [batch, kv_heads, keys, head_dim], query head j uses kv head
    j // (heads / kv_heads); mask [batch, 1, queries, keys] bool, True = may look. Without a mask: causal (the queries are the last
    positions) from first_key [batch, queries] on, the start of each query's document, which never falls along a row; None = 0.
    """
    repeats, (queries, keys) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) / math.sqrt(query.shape[-1])       # [batch, heads, queries, keys]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if first_key is not None:
            mask = mask & (torch.arange(keys, device=query.device) >= first_key[:, None, :, None])
    probabilities = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1, dtype=torch.float32)
    return torch.matmul(probabilities.to(query.dtype), value)


@torch.no_grad()
def adamw(parameter: Tensor, grad: Tensor, step: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, decay: float, learning_rate: float,
          beta1: float, beta2: float, epsilon: float, grad_scale: float) -> None:
    """One step of one parameter, in place: decay apart from the gradient, both moments corrected (Loshchilov and Hutter 2019, alg. 2)."""
    step += 1
    grad = grad * grad_scale
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    mean, mean_square = exp_avg / (1 - beta1 ** float(step)), exp_avg_sq / (1 - beta2 ** float(step))
    parameter.mul_(1 - learning_rate * decay).sub_(learning_rate * mean / (mean_square.sqrt() + epsilon))
