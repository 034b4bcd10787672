"""The bias update and the load figures against their formulas; the update really balances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparseling.config import preset
from sparseling.model.router import Router
from sparseling.train.balance import expert_counts, load_figures, update_bias


def test_update_is_rate_times_sign_minus_its_mean() -> None:
    router = Router(preset("pico"))
    counts = np.array([5, 1, 1, 1, 0, 0, 0, 0])
    update_bias([router], torch.tensor(counts)[None], 1e-3)
    sign = np.sign(counts.mean() - counts)
    assert np.allclose(router.expert_bias.numpy(), 1e-3 * (sign - sign.mean()), atol=1e-9)
    assert abs(router.expert_bias.sum().item()) < 1e-8


def test_bias_evens_out_a_router_that_prefers_few_experts() -> None:
    config = preset("pico").replace(n_group=1, topk_group=1)
    router = Router(config)
    g = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.05, generator=g)
    x = torch.randn(2000, 32, generator=g) + 1.0  # a common direction: some experts win for every token
    before = load_figures(expert_counts([router(x)], 8))["max_violation"][0]
    for _ in range(600):
        update_bias([router], expert_counts([router(x)], 8), 1e-3)
    after = load_figures(expert_counts([router(x)], 8))["max_violation"][0]
    assert before > 0.5 and after < 0.1


def test_load_figures_by_hand() -> None:
    figures = load_figures(torch.tensor([[4, 0, 2, 2], [3, 3, 3, 3]]))
    assert figures["max_violation"] == [1.0, 0.0]
    assert figures["min_violation"] == [1.0, 0.0]
    share = np.array([0.5, 0.25, 0.25])
    assert figures["load_entropy"] == [pytest.approx(-(share * np.log(share)).sum() / np.log(4), abs=1e-5), 1.0]
