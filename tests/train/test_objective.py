"""Labels, normalisation and the parts of the loss against brute force."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparseling.config import preset
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.train.objective import LossWeights, count_valid, losses, mtp_labels


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, 512, (4, 12), generator=g)
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0] + [1] * 11, [0] * 3 + [1] * 3 + [2] * 6])
    labels = torch.roll(input_ids, -1, 1)
    labels[:, -1] = 7
    ends = torch.zeros_like(labels, dtype=torch.bool)
    ends[:, :-1] = document_ids[:, 1:] != document_ids[:, :-1]
    return input_ids, labels.masked_fill(ends, -100), document_ids


def test_mtp_labels_look_further_inside_a_document_only() -> None:
    _, labels, document_ids = batch()
    for depth in (1, 2):
        got = mtp_labels(labels, document_ids, depth)
        for b in range(4):
            for t in range(12):
                inside = t + depth < 12 and document_ids[b, t + depth] == document_ids[b, t]
                assert got[b, t] == (labels[b, t + depth] if inside else -100)


def test_total_is_main_plus_weighted_mtp_and_z_over_valid_tokens() -> None:
    model = initialize(LingForCausalLM(preset("pico").replace(num_nextn_predict_layers=2)), 0)
    input_ids, labels, document_ids = batch()
    weights = LossWeights(mtp=0.3, router_z=0.01)
    got = losses(model, input_ids, labels, document_ids, weights, count_valid(labels, document_ids, 2))
    out = model(input_ids, document_ids=document_ids, with_mtp=True)
    main = F.cross_entropy(model.logits(out.hidden_states).flatten(0, 1), labels.flatten())
    mtp = [
        F.cross_entropy(model.logits(h).flatten(0, 1), mtp_labels(labels, document_ids, d + 1).flatten())
        for d, h in enumerate(out.mtp_hidden_states)
    ]
    z = sum((r.logits.exp().sum(-1).log() ** 2).mean() for r in out.routing)
    assert got.total.item() == pytest.approx((main + 0.3 * sum(mtp) / 2 + 0.01 * z).item(), rel=1e-5)
    assert got.mtp == pytest.approx(sum(mtp).item() / 2, rel=1e-5)


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    model = initialize(LingForCausalLM(preset("pico")), 0)
    input_ids, labels, document_ids = batch()
    valid = count_valid(labels, document_ids, 1)

    def gradients(size: int) -> list[torch.Tensor]:
        model.zero_grad()
        for a in range(0, 4, size):
            losses(model, input_ids[a : a + size], labels[a : a + size], document_ids[a : a + size], LossWeights(), valid).total.backward()
        return [p.grad.clone() for p in model.parameters()]

    for whole, parts in zip(gradients(4), gradients(1), strict=True):
        assert torch.allclose(whole, parts, atol=1e-6, rtol=1e-4)


def test_a_batch_without_labels_gives_zero_not_nan() -> None:
    model = initialize(LingForCausalLM(preset("pico")), 0)
    input_ids, labels, document_ids = batch()
    labels = torch.full_like(labels, -100)
    got = losses(model, input_ids, labels, document_ids, LossWeights(router_z=0.0), count_valid(labels, document_ids, 1))
    got.total.backward()
    assert got.total.item() == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
