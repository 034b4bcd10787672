"""Golden parity: logits, hidden states, routing and losses of the public implementation (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparseling.checkpoint.hf import load_model
from sparseling.kernels.choose import forced_path
from sparseling.model.transformer import LingForCausalLM
from sparseling.train.objective import mtp_labels

GOLDEN = Path(__file__).parents[1] / "golden"


def run(case: str, **kwargs: object) -> tuple[LingForCausalLM, dict, object, list[torch.Tensor]]:
    expected = load_file(GOLDEN / case / "expected.safetensors")
    model = load_model(GOLDEN / case).eval()
    layer_outputs: list[torch.Tensor] = []
    model.model.word_embeddings.register_forward_hook(lambda m, a, y: layer_outputs.append(y))
    for layer in model.model.layers[:-1]:
        layer.register_forward_hook(lambda m, a, y: layer_outputs.append(y[0]))
    # in bf16 the golden data have the public cast order, which only the reference keeps; in fp32 the fast path agrees to rounding
    with torch.no_grad(), forced_path("reference" if case == "bf16" else "cpu"):
        out = model(expected["input_ids"], **{k: expected[k] if v is None else v for k, v in kwargs.items()})
    return model, expected, out, layer_outputs


def same_experts(expected: dict, out: object, real: torch.Tensor) -> None:
    for n, routing in enumerate(out.routing):
        want = expected[f"router_topk_idx.{n}"].reshape(-1, routing.expert_ids.shape[1])
        assert torch.equal(want.sort(-1).values[real], routing.expert_ids.sort(-1).values[real])


@pytest.mark.parametrize("case", ["fp32", "fp32-yarn", "fp32-pad", "fp32-mtp"])
def test_fp32_logits_within_1e_5_and_identical_experts(case: str) -> None:
    kwargs = {"attention_mask": None} if case == "fp32-pad" else {"with_mtp": True} if case == "fp32-mtp" else {}
    model, expected, out, layers = run(case, **kwargs)
    real = expected.get("attention_mask", torch.ones_like(expected["input_ids"])).bool()
    logits = model.logits(out.hidden_states)
    assert (logits - expected["logits"])[real].abs().max() <= 1e-5
    for n in range(3):  # the residual stream is not normalised: relative to its size
        want = expected[f"hidden_states.{n}"][real]
        assert (layers[n][real] - want).abs().max() <= 1e-6 * want.abs().max()
    assert (out.hidden_states - expected["hidden_states.3"])[real].abs().max() <= 1e-5
    same_experts(expected, out, real.reshape(-1))
    for n, routing in enumerate(out.routing):
        want = expected[f"router_logits.{n}"][real]
        assert (routing.logits.view_as(expected[f"router_logits.{n}"])[real] - want).abs().max() <= 1e-6 * want.abs().max()


def test_mtp_logits_and_losses() -> None:
    model, expected, out, _ = run("fp32-mtp", with_mtp=True)
    logits = model.logits(out.mtp_hidden_states[0])
    assert (logits - expected["mtp_logits.0"]).abs().max() <= 1e-5
    shifted = torch.nn.functional.pad(expected["labels"][:, 1:], (0, 1), value=-100)
    main = torch.nn.functional.cross_entropy(model.logits(out.hidden_states).flatten(0, 1), shifted.flatten())
    deeper = mtp_labels(shifted, torch.zeros_like(shifted), depth=1)
    mtp = torch.nn.functional.cross_entropy(logits.flatten(0, 1), deeper.flatten())
    # The stored MTP loss has one stray target across rows; row by row it is 6.6506896 (tests/golden/README.md).
    assert mtp.item() == pytest.approx(6.6506896, abs=1e-5)
    assert main.item() == pytest.approx(expected["loss"].item() - 0.1 * expected["mtp_loss.0"].item(), abs=1e-5)


def test_bf16_within_rounding_and_same_experts_where_the_choice_is_clear() -> None:
    model, expected, out, _ = run("bf16")
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.routers()[0].expert_bias.dtype == torch.float32
    logits, want = model.logits(out.hidden_states), expected["logits"].float()
    step = 2.0 ** (torch.floor(torch.log2(want.abs().max())) - 7)                # one bf16 step of the largest logit
    assert (logits - want).abs().max() <= 2 * step
    for n, (routing, router) in enumerate(zip(out.routing, model.routers(), strict=True)):
        biased = torch.sigmoid(expected[f"router_logits.{n}"].float().flatten(0, 1)) + router.expert_bias
        k = routing.expert_ids.shape[1]
        ours, theirs = routing.expert_ids.sort(-1).values, expected[f"router_topk_idx.{n}"].flatten(0, 1).sort(-1).values
        for t in (ours != theirs).any(-1).nonzero().flatten():
            taken = biased[t][theirs[t]]
            others = biased[t].clone()
            others[theirs[t]] = -1
            assert taken.min() - others.max() < 2**-8, f"layer {n} token {t} of {k} experts differs without a near tie"


def test_a_cache_filled_in_two_steps_gives_the_logits_of_one_pass() -> None:
    from sparseling.model.cache import KVCache

    model, expected, _, _ = run("fp32")
    ids = expected["input_ids"]
    cache = KVCache(model.config, batch=2, capacity=ids.shape[1])
    with torch.no_grad():
        parts = [model(ids[:, a:b], cache=cache).hidden_states for a, b in [(0, 9), (9, 10), (10, 21)]]
    assert (model.logits(torch.cat(parts, 1)) - expected["logits"]).abs().max() <= 1e-5
