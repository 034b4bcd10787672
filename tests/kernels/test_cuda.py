"""What runs on CUDA devices, on CPU tensors as far as they allow: grouped products for real, variable-length attention emulated."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseling.kernels import cuda, reference


def close(got: Tensor, want: Tensor, relative: float) -> bool:
    return bool((got.double() - want.double()).abs().max() <= relative * want.double().abs().max())


@pytest.mark.parametrize("routing", ["random", "one expert takes all", "one token"])
def test_grouped_experts_equal_the_reference_with_gradients(routing: str) -> None:
    g = torch.Generator().manual_seed(0)
    tokens = 1 if routing == "one token" else 37
    ids = torch.rand(tokens, 9, generator=g).topk(3).indices
    if routing == "one expert takes all":
        ids = torch.tensor([4, 1, 2]).expand(tokens, 3).contiguous()
    floats = [torch.randn(*shape, generator=g).requires_grad_() for shape in ((tokens, 16), (tokens, 3), (9, 16, 16), (9, 16, 8))]
    x, weights, gate_up, down = floats
    assert cuda.can_group(x, gate_up)
    got, want = cuda.experts(x, ids, weights, gate_up, down), reference.experts(x, ids, weights, gate_up, down)
    assert close(got, want, 1e-5)
    grad = torch.randn(want.shape, generator=g)
    for a, b in zip(torch.autograd.grad(got, floats, grad), torch.autograd.grad(want, floats, grad), strict=True):
        assert close(a, b, 1e-5)


def test_shapes_that_grouped_products_refuse_are_told_apart() -> None:
    assert not cuda.can_group(torch.zeros(3, 30, dtype=torch.bfloat16), torch.zeros(2, 16, 30))
    assert not cuda.can_group(torch.zeros(3, 16, dtype=torch.bfloat16), torch.zeros(2, 12, 16))


def emulated(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Each document alone."""
    parts = []
    for a, b in pairwise(starts.tolist()):
        assert 0 < b - a <= longest
        q, k, v = (t[a:b].transpose(0, 1)[None] for t in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


def test_packed_attention_cuts_documents_as_the_reference_masks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, heads, 11, 8, generator=g) for heads in (4, 2, 2))
    first_key = torch.tensor([[0, 0, 0, 3, 3, 5, 6, 6, 6, 6, 6], [0] * 10 + [10]], dtype=torch.int32)
    monkeypatch.setattr(cuda, "varlen_attention", emulated)
    assert cuda.documents_of(first_key)[0].tolist() == [0, 3, 5, 6, 11, 21, 22] and cuda.documents_of(first_key)[1] == 10
    assert close(cuda.attention(query, key, value, first_key), reference.attention(query, key, value, None, first_key), 1e-5)


def test_documents_are_looked_for_once_a_tensor() -> None:
    first_key = torch.tensor([[0, 0, 2, 2]], dtype=torch.int32)
    assert cuda.documents_of(first_key) is cuda.documents_of(first_key)
    other = torch.tensor([[0, 1, 1, 1]], dtype=torch.int32)
    assert cuda.documents_of(other)[0].tolist() == [0, 1, 4] and cuda.documents_of(other)[1] == 3


@pytest.mark.parametrize("wanted", [["x"], ["weights", "down"]])
def test_grouped_experts_in_bf16_give_the_gradients_that_are_wanted(wanted: list[str]) -> None:
    g = torch.Generator().manual_seed(2)
    ids = torch.rand(50, 6, generator=g).topk(2).indices
    shapes = {"x": (50, 32), "weights": (50, 2), "gate_up": (6, 32, 32), "down": (6, 32, 16)}
    tensors = {name: torch.randn(*shape, generator=g) / 4 for name, shape in shapes.items()}
    results = []
    for function in (cuda.experts, reference.experts):
        leaves = {name: t.to(torch.bfloat16 if name == "x" else torch.float32).detach().clone().requires_grad_(name in wanted)
                  for name, t in tensors.items()}
        y = function(leaves["x"], ids, leaves["weights"], leaves["gate_up"], leaves["down"])
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [leaves[name] for name in wanted])])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and close(got, want, 2**-5)
