"""The router against a float64 brute force written from the formulas of L2 §2.2."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparseling.config import preset
from sparseling.kernels.reference import choose_experts
from sparseling.model.router import Router


def brute_force(biased: np.ndarray, groups: int, kept: int, k: int) -> set[int]:
    """Best k experts of the best groups; a group scores the sum of its two best."""
    per_group = len(biased) // groups
    order = sorted(range(groups), key=lambda g: -sum(sorted(biased[g * per_group : (g + 1) * per_group])[-2:]))[:kept]
    allowed = [e for g in order for e in range(g * per_group, (g + 1) * per_group)]
    return set(sorted(allowed, key=lambda e: -biased[e])[:k])


@pytest.mark.parametrize(
    ("experts", "groups", "kept", "k", "shift"), [(16, 4, 2, 4, 0.0), (64, 8, 4, 4, -2.0), (12, 1, 1, 3, 0.0), (8, 2, 1, 4, -5.0)]
)
def test_choice_equals_brute_force(experts: int, groups: int, kept: int, k: int, shift: float) -> None:
    scores = torch.rand(200, experts, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + shift
    chosen = choose_experts(scores, groups, kept, k)
    for row, ids in zip(scores.numpy(), chosen.tolist(), strict=True):
        assert set(ids) == brute_force(row, groups, kept, k)


def test_negative_scores_never_let_in_a_rejected_group() -> None:
    # with 0 instead of -inf as the mask, experts of rejected groups would win here
    scores = torch.full((1, 8), -1.0)
    scores[0, :4] = -0.5
    assert set(choose_experts(scores, 2, 1, 4)[0].tolist()) == {0, 1, 2, 3}


def test_bias_chooses_but_does_not_weigh_and_weights_sum_to_the_scale() -> None:
    config = preset("pico")
    router = Router(config)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(1))
    router.expert_bias[3] = 10.0
    routing = router(x)
    assert (routing.expert_ids == 3).any(-1).all()
    scores = torch.sigmoid(x.double() @ router.weight.double().T)
    chosen = scores.gather(1, routing.expert_ids)
    want = 2.5 * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    assert torch.allclose(routing.weights.double(), want, atol=1e-6)
    assert torch.allclose(routing.weights.sum(-1), torch.full((50,), 2.5), atol=1e-5)


def test_casting_the_model_leaves_the_bias_in_fp32() -> None:
    router = Router(preset("pico"))
    router.expert_bias += 0.001 * torch.arange(8)
    before = router.expert_bias.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32 and torch.equal(router.expert_bias, before)


def test_a_single_expert_keeps_its_raw_score() -> None:
    router = Router(preset("pico").replace(num_experts_per_tok=1))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    routing = router(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(routing.weights, 2.5 * torch.sigmoid(routing.logits).gather(1, routing.expert_ids))
