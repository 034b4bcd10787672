"""Parameter totals equal the published ones to the last digit, and equal a count of the real tensors on small models."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparseling.accounting import count_parameters, forward_flops_per_token, kv_bytes_per_token, law_flops_per_token
from sparseling.config import PRESETS, preset
from sparseling.info import figures
from sparseling.kernels.choose import forced_path
from sparseling.model.transformer import LingForCausalLM

PUBLISHED = {  # name: total, active, active non-embedding, total with one MTP layer
    "ling-mini-2.0": (16_255_638_528, 1_432_968_192, 789_142_528, 17_083_499_776),
    "ling-flash-2.0": (102_889_697_280, 6_152_269_824, 4_864_618_496, 106_195_878_144),
    "ling-1t": (999_705_309_184, 51_054_407_680, 48_479_105_024, 1_012_927_893_760),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_totals_equal_the_published_ones(name: str) -> None:
    plain, with_mtp = count_parameters(preset(name)), count_parameters(preset(name).replace(num_nextn_predict_layers=1))
    assert (plain.total, plain.active, plain.active_non_embedding, with_mtp.total) == PUBLISHED[name]
    assert (with_mtp.active, with_mtp.active_non_embedding) == PUBLISHED[name][1:3]


@pytest.mark.parametrize("changes", [
    {}, {"num_nextn_predict_layers": 2}, {"tie_word_embeddings": True}, {"use_qk_norm": False}, {"use_qkv_bias": True, "use_bias": True},
    {"num_shared_experts": 0}, {"num_shared_experts": 2}, {"first_k_dense_replace": 0}, {"first_k_dense_replace": 5},
])
def test_total_equals_the_elements_of_the_built_model(changes: dict) -> None:
    config = preset("pico").replace(**changes)
    with torch.device("meta"):
        model = LingForCausalLM(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "compute"), [("ling-mini-2.0", 1.338e23), ("ling-flash-2.0", 7.087e23), ("ling-1t", 6.442e24)])
def test_law_flops_give_the_published_compute_over_20t_tokens(name: str, compute: float) -> None:
    # ling-2.0-facts, section 2.2: C = M x 20T tokens at 4,096 tokens of context
    assert law_flops_per_token(preset(name), 4096) * 20e12 == pytest.approx(compute, rel=1e-3)


def test_forward_flops_count_every_matrix_product() -> None:
    config = preset("pico")
    counter = FlopCounterMode(display=False)
    model = LingForCausalLM(config)
    seq = 64
    with counter, torch.no_grad(), forced_path("reference"):  # the counter knows PyTorch's operations only
        out = model(torch.zeros(1, seq, dtype=torch.int64), with_mtp=True)
        model.logits(out.hidden_states)
        model.logits(out.mtp_hidden_states[0])
    assert counter.get_total_flops() == forward_flops_per_token(config, seq, head=True, mtp=True) * seq


def test_kv_bytes_and_info_keys() -> None:
    assert kv_bytes_per_token(preset("ling-mini-2.0")) == 2 * 4 * 128 * 20 * 2
    assert {"parameters_total", "parameters_active", "parameters_active_non_embedding", "flops_per_token", "kv_bytes_per_token"} <= set(
        figures(preset("ling-mini-2.0"), 4096))


def test_every_preset_keeps_the_proportions_of_the_recipe() -> None:
    for name, config in PRESETS.items():
        assert 2 * config.hidden_size / config.moe_intermediate_size == 8, name
        assert config.rotary_dim * 2 == config.head_dim, name
