"""Properties of the whole model: packed documents equal separate ones, padding changes nothing, YaRN, seeds, causality."""

from __future__ import annotations

import math

import pytest
import torch

from sparseling.config import preset
from sparseling.kernels.reference import rotate
from sparseling.model.attention import positions_in_documents
from sparseling.model.cache import KVCache
from sparseling.model.rotary import Rotary, frequencies_of, rotary_table
from sparseling.model.transformer import LingForCausalLM, initialize


def small(**changes: object) -> LingForCausalLM:
    model = initialize(LingForCausalLM(preset("pico").replace(initializer_range=0.3, **changes)), seed=7).eval()
    for router in model.routers():
        router.expert_bias.copy_(0.1 * torch.randn(router.expert_bias.shape, generator=torch.Generator().manual_seed(1)))
    return model


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_packed_documents_equal_each_document_alone() -> None:
    model, lengths = small(), [5, 1, 17, 9]
    packed = ids(1, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    out = model(packed, document_ids=document_ids, with_mtp=True)
    start = 0
    for length in lengths:
        alone = model(packed[:, start:start + length], with_mtp=True)
        assert (out.hidden_states[:, start:start + length] - alone.hidden_states).abs().max() < 1e-5
        # the MTP layer sees the next token at every slot but the document's last, where it has no label
        inside = slice(start, start + length - 1)
        if length > 1:
            assert (out.mtp_hidden_states[0][:, inside] - alone.mtp_hidden_states[0][:, :length - 1]).abs().max() < 1e-5
        start += length


@torch.no_grad()
def test_left_padding_changes_nothing_for_real_tokens() -> None:
    model, tokens = small(), ids(1, 9)
    padded = torch.cat([torch.full((1, 4), 1), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 9)], dim=1)
    positions = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.arange(9)[None]], dim=1)
    got = model(padded, attention_mask=mask, position_ids=positions).hidden_states[:, 4:]
    assert (got - model(tokens).hidden_states).abs().max() < 1e-5


@torch.no_grad()
def test_a_token_never_sees_the_future() -> None:
    model, tokens = small(), ids(2, 12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 512
    moved = (model(tokens).hidden_states - model(changed).hidden_states).abs().amax((0, 2))
    assert moved[:8].max() < 1e-5 < moved[8]


@torch.no_grad()
def test_mtp_depth_two_reads_only_tokens_up_to_its_depth() -> None:
    model, tokens = small(num_nextn_predict_layers=2), ids(1, 12)
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 1) % 512
    first, second = model(tokens, with_mtp=True), model(changed, with_mtp=True)
    for depth in (1, 2):
        moved = (first.mtp_hidden_states[depth - 1] - second.mtp_hidden_states[depth - 1]).abs().amax(-1)[0]
        assert moved[: 8 - depth].max() < 1e-5 < moved[8 - depth]
    assert len(first.routing) == 3  # one MoE layer of two, and two MTP layers


@torch.no_grad()
def test_cache_refuses_more_than_its_capacity() -> None:
    model = small()
    cache = KVCache(model.config, batch=1, capacity=4)
    model(ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match="capacity"):
        model(ids(1, 1), cache=cache)


def test_positions_restart_with_each_document() -> None:
    document_ids = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 6, 6, 6, 6]])
    assert positions_in_documents(document_ids).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]


def test_rotation_turns_pairs_by_position_times_frequency_and_passes_the_rest() -> None:
    config = preset("pico").replace(head_dim=16)
    x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    table = rotary_table(config, torch.arange(5)[None], torch.float32)
    y = rotate(x, table.cos, table.sin).double()
    for position in range(5):
        for i in range(4):
            angle = position * config.rope_theta ** (-2 * i / 8)
            a, b = x[0, 0, position, i].item(), x[0, 0, position, i + 4].item()
            assert y[0, 0, position, i].item() == pytest.approx(a * math.cos(angle) - b * math.sin(angle), abs=1e-5)
            assert y[0, 0, position, i + 4].item() == pytest.approx(b * math.cos(angle) + a * math.sin(angle), abs=1e-5)
    assert torch.equal(y[..., 8:].float(), x[..., 8:])
    assert isinstance(table, Rotary)


def test_yarn_keeps_fast_and_stretches_slow_frequencies() -> None:
    config = preset("ling-mini-2.0").replace(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    plain, one = frequencies_of(config.replace(rope_scaling=None))
    stretched, temperature = frequencies_of(config)
    assert one == 1.0 and temperature == pytest.approx(0.1 * math.log(4) + 1)
    turns = 32768 * plain / (2 * math.pi)
    assert torch.allclose(stretched[turns > 40], plain[turns > 40])
    assert torch.allclose(stretched[turns < 0.7], plain[turns < 0.7] / 4)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    a, b, other = small(), small(num_hidden_layers=3), initialize(LingForCausalLM(small().config), seed=8)
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(a.state_dict()[name], b.state_dict()[name])
    assert not torch.equal(a.state_dict()[name], other.state_dict()[name])
    std = initialize(LingForCausalLM(preset("nano")), seed=0).lm_head.weight.std().item()
    assert std == pytest.approx(preset("nano").initializer_range, rel=0.01)
