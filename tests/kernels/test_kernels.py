"""Fast paths against the plain reference, forward and backward, on awkward shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseling.kernels import attention, cross_entropy, experts, reference


def close(got: Tensor, want: Tensor, relative: float) -> bool:
    return bool((got.double() - want.double()).abs().max() <= relative * want.double().abs().max().clamp_min(1e-6))


def expert_inputs(tokens: int, k: int, num_experts: int, hidden: int, width: int, routing: str, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=g)[:k] for _ in range(tokens)])
    if routing == "one hot expert":
        ids = torch.arange(k).expand(tokens, k).contiguous()
    tensors = [
        torch.randn(tokens, hidden, generator=g),
        ids,
        torch.rand(tokens, k, generator=g),
        torch.randn(num_experts, 2 * width, hidden, generator=g),
        torch.randn(num_experts, hidden, width, generator=g),
    ]
    return [t.requires_grad_() if t.is_floating_point() else t for t in tensors]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 40),
    k=st.integers(1, 4),
    extra=st.integers(0, 20),
    hidden=st.integers(1, 17),
    width=st.integers(1, 9),
    routing=st.sampled_from(["random", "one hot expert"]),
    seed=st.integers(0, 99),
)
def test_experts_equal_the_reference_with_all_gradients(
    tokens: int, k: int, extra: int, hidden: int, width: int, routing: str, seed: int
) -> None:
    inputs = expert_inputs(tokens, k, k + extra, hidden, width, routing, seed)
    grad = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed + 1))
    floats = [t for t in inputs if t.requires_grad]
    want, got = reference.experts(*inputs), experts.experts(*inputs)
    assert close(got, want, 1e-5)
    for a, b in zip(torch.autograd.grad(got, floats, grad), torch.autograd.grad(want, floats, grad), strict=True):
        assert close(a, b, 1e-5)


def test_experts_reference_equals_the_formula_in_float64() -> None:
    x, ids, weights, gate_up, down = (
        t.detach().double() if t.is_floating_point() else t for t in expert_inputs(6, 2, 5, 7, 3, "random", 0)
    )
    got = reference.experts(x.float(), ids, weights.float(), gate_up.float(), down.float())
    for t in range(6):
        want = torch.zeros(7, dtype=torch.float64)
        for j in range(2):
            gate, up = (gate_up[ids[t, j]] @ x[t]).chunk(2)
            want += weights[t, j] * (down[ids[t, j]] @ (gate / (1 + torch.exp(-gate)) * up))
        assert close(got[t], want, 1e-5)


def test_experts_in_bf16_stay_within_rounding() -> None:
    inputs = [t.detach().bfloat16() if n in (0, 3, 4) else t for n, t in enumerate(expert_inputs(33, 3, 9, 16, 8, "random", 1))]
    exact = reference.experts(*[t.float() if t.dtype == torch.bfloat16 else t for t in inputs])
    assert experts.experts(*inputs).dtype == torch.bfloat16
    assert close(experts.experts(*inputs), exact, 2**-6)


def test_experts_give_the_same_bits_run_to_run() -> None:
    inputs = expert_inputs(300, 4, 16, 32, 8, "random", 2)
    first = torch.autograd.grad(experts.experts(*inputs).square().sum(), [t for t in inputs if t.requires_grad])
    second = torch.autograd.grad(experts.experts(*inputs).square().sum(), [t for t in inputs if t.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tokens", [1, 1024, 1025, 2500])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_cross_entropy_equals_the_reference_with_gradients(tokens: int, ignored: str) -> None:
    g = torch.Generator().manual_seed(tokens)
    hidden, head = torch.randn(tokens, 12, generator=g).requires_grad_(), torch.randn(50, 12, generator=g).requires_grad_()
    labels = torch.randint(0, 50, (tokens,), generator=g)
    if ignored != "none":
        labels[torch.rand(tokens, generator=g) < (2.0 if ignored == "all" else 0.6)] = -100
    got, want = cross_entropy.cross_entropy_sum(hidden, head, labels), reference.cross_entropy_sum(hidden, head, labels)
    assert close(got, want, 1e-5)
    for a, b in zip(torch.autograd.grad(got / 7, [hidden, head]), torch.autograd.grad(want / 7, [hidden, head]), strict=True):
        assert close(a, b, 1e-5) or b.abs().max() == 0 == a.abs().max()


def test_cross_entropy_under_no_grad_keeps_nothing() -> None:
    hidden, head = torch.randn(3, 4), torch.randn(5, 4)
    with torch.no_grad():
        assert cross_entropy.cross_entropy_sum(hidden, head, torch.tensor([1, -100, 2])).requires_grad is False


@pytest.mark.parametrize("masked", [False, True])
def test_attention_equals_the_reference(masked: bool) -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 9, 8, generator=g).requires_grad_() for h in (6, 2, 2))
    mask = (torch.rand(2, 1, 9, 9, generator=g) < 0.5) | torch.eye(9, dtype=torch.bool) if masked else None
    got, want = attention.attention(query, key, value, mask), reference.attention(query, key, value, mask)
    assert close(got, want, 1e-5)
    grad = torch.randn(want.shape, generator=g)
    for a, b in zip(torch.autograd.grad(got, [query, key, value], grad), torch.autograd.grad(want, [query, key, value], grad), strict=True):
        assert close(a, b, 1e-5)
