"""The native engine against the model in PyTorch, and against itself in other company."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparseling.config import ModelConfig, preset
from sparseling.errors import UserError
from sparseling.kernels.library import VARIANTS
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.run.engine import PAGE, Engine, StepOutput
from sparseling.run.packed import Kind, empty_packed, pack, pack_into, unpack
from sparseling.run.source import source_of_model

from ..kernels.conftest import built_variant

SMALL = preset("nano").replace(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_experts=20, num_experts_per_tok=3, n_group=4,
    topk_group=2, max_position_embeddings=640, num_nextn_predict_layers=0, initializer_range=0.1,
)
KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8", "int4")


@pytest.fixture(autouse=True, params=list(VARIANTS))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything here on every variant that this CPU runs."""
    with built_variant(request.param):
        yield request.param


def model_of(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float32) -> LingForCausalLM:
    model = initialize(LingForCausalLM(config), 3)
    g = torch.Generator().manual_seed(5)
    for router in model.routers():
        router.expert_bias += 0.2 * torch.randn(config.num_experts, generator=g)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=g)
    return model.to(dtype).eval()


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def run(engine: Engine, ids: Tensor, chunks: list[int], pages: list[int] | None = None, **options: bool) -> StepOutput:
    """One sequence in chunks; what the last of them gives for all its tokens."""
    table = torch.tensor([pages or list(range(-(-len(ids) // PAGE)))], dtype=torch.int32)
    start = 0
    for chunk in chunks:
        positions = torch.arange(start, start + chunk)
        out = engine.step(ids[start:start + chunk], positions, torch.zeros(chunk, dtype=torch.int64), table, torch.arange(chunk), **options)
        start += chunk
    return out


@torch.no_grad()
def logits_of(model: LingForCausalLM, ids: Tensor) -> Tensor:
    return model.logits(model(ids[None]).hidden_states)[0]


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("length", [1, 15, 16, 17, 129, 300])
def test_fp32_logits_equal_the_models(length: int) -> None:
    model, ids = model_of(), random_ids(length)
    assert relative_error(run(Engine(source_of_model(model, "fp32"), 40), ids, [length]).logits, logits_of(model, ids)) < 2e-5


@pytest.mark.parametrize("changes", [
    {"n_group": 1, "topk_group": 1}, {"num_shared_experts": 0}, {"num_shared_experts": 2}, {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 3}, {"use_qk_norm": False}, {"use_qkv_bias": True, "use_bias": True}, {"num_experts_per_tok": 1},
    {"partial_rotary_factor": 1.0}, {"num_attention_heads": 32, "num_key_value_heads": 1}, {"head_dim": 64}, {"vocab_size": 17},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 160}}, {"tie_word_embeddings": True},
])
def test_every_option_of_the_config_is_computed(changes: dict[str, object]) -> None:
    model, ids = model_of(SMALL.replace(**changes)), random_ids(40) % int(str(changes.get("vocab_size", 300)))
    assert relative_error(run(Engine(source_of_model(model, "fp32"), 3), ids, [33, 7]).logits, logits_of(model, ids)[33:]) < 2e-5


def dequantised(model: LingForCausalLM, kind: Kind) -> LingForCausalLM:
    """The model with the weights that the engine's products see."""
    def seen(weight: Tensor) -> Tensor:
        return unpack(pack(weight.flatten(0, -2), kind)).view_as(weight)

    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "word_embeddings" not in name and not name.endswith("gate.weight"):
            parameter.data = seen(parameter.data)
    return model


@pytest.mark.parametrize(("kind", "error"), [("bf16", 2e-2), ("int8", 4e-2), ("int4", 4e-2)])
def test_narrow_weights_differ_from_their_own_values_by_rounded_activations_only(kind: Kind, error: float) -> None:
    plain = SMALL.replace(num_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)  # no choice that rounding could change
    ids = random_ids(70)
    got = run(Engine(source_of_model(model_of(plain), kind), 8), ids, [70]).logits
    assert relative_error(got, logits_of(dequantised(model_of(plain), kind), ids)) < error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_in_chunks_of_any_size_and_with_any_company(kind: Kind, threads: int) -> None:
    model, ids = model_of(), random_ids(150)
    alone = run(Engine(source_of_model(model, kind), 40, threads), ids, [150], routing=True)
    for chunks in ([149, 1], [1] * 150, [7, 64, 79]):
        assert torch.equal(run(Engine(source_of_model(model, kind), 40, threads), ids, chunks).logits, alone.logits[-chunks[-1]:])
    engine, others = Engine(source_of_model(model, kind), 40, threads), [random_ids(n, seed=n) for n in (5, 90, 33)]
    sequences = [others[0], others[1], ids, others[2]]
    tables, free = torch.zeros(4, 10, dtype=torch.int32), torch.randperm(40, generator=torch.Generator().manual_seed(1)).int()
    for s, sequence in enumerate(sequences):
        count = -(-len(sequence) // PAGE)
        tables[s, :count], free = free[:count], free[count:]
    lengths = [len(s) for s in sequences]
    positions, owners = torch.cat([torch.arange(n) for n in lengths]), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    out = engine.step(torch.cat(sequences), positions, owners, tables, torch.arange(sum(lengths)), routing=True)
    first = lengths[0] + lengths[1]
    assert torch.equal(out.logits[first:first + 150], alone.logits)
    assert out.expert_ids is not None and alone.expert_ids is not None
    assert torch.equal(out.expert_ids[:, first:first + 150], alone.expert_ids)


def test_threads_change_no_bit() -> None:
    model, ids = model_of(), random_ids(50)
    one = run(Engine(source_of_model(model, "int4"), 4, 1), ids, [50]).logits
    assert all(torch.equal(run(Engine(source_of_model(model, "int4"), 4, threads), ids, [50]).logits, one) for threads in (2, 3))


def test_routing_and_hidden_states_are_the_models() -> None:
    model, ids = model_of(), random_ids(60)
    out = run(Engine(source_of_model(model, "fp32"), 4), ids, [60], routing=True, scores=True, hidden=True)
    with torch.no_grad():
        want = model(ids[None])
    assert out.hidden is not None and relative_error(out.hidden, want.hidden_states[0]) < 2e-5
    assert out.expert_ids is not None and out.expert_weights is not None and out.expert_scores is not None
    for layer, routing in enumerate(want.routing):
        assert torch.equal(out.expert_ids[layer].long(), routing.expert_ids)
        torch.testing.assert_close(out.expert_weights[layer], routing.weights, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(out.expert_scores[layer], torch.sigmoid(routing.logits), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("kind", "bits"), [("fp32", 40), ("bf16", 9), ("int8", 8), ("int4", 4)])
def test_packed_weights_unpack_to_what_they_were(kind: Kind, bits: int) -> None:
    g = torch.Generator().manual_seed(2)
    for shape in ((16, 32), (33, 70), (1, 1)):
        weight = torch.randn(shape, generator=g)
        back = unpack(pack(weight, kind))
        assert back.shape == weight.shape
        by_group = torch.nn.functional.pad(weight.abs(), (0, -shape[1] % 32)).unflatten(1, (-1, 32))
        largest = by_group.amax(-1).repeat_interleave(32, 1)[:, :shape[1]]
        assert ((back - weight).abs() <= 1.02 * largest * 2.0**(1 - bits)).all()
        if kind == "bf16":
            assert torch.equal(back, weight.bfloat16().float())
    assert torch.equal(unpack(pack(torch.zeros(16, 32), kind)), torch.zeros(16, 32))


def test_int4_chooses_a_better_grid_than_that_of_the_largest_value() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))
    groups = weight.view(64, 8, 32)
    plain = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    rounded = (groups / plain).round().clamp(-8, 7) * plain
    assert relative_error(unpack(pack(weight, "int4")), weight) < 0.95 * relative_error(rounded.view_as(weight), weight)


def test_gate_and_up_rows_take_turns_by_sixteen() -> None:
    gate, up = torch.arange(32.0)[:, None].expand(32, 3), 100 + torch.arange(32.0)[:, None].expand(32, 3)
    both = empty_packed("fp32", 64, 3)
    pack_into(both, gate, 0, step=2)
    pack_into(both, up, 1, step=2)
    assert unpack(both)[:, 0].tolist() == [*range(16), *range(100, 116), *range(16, 32), *range(116, 132)]
    for weight, block in ((gate, 4), (gate, 3), (torch.zeros(16, 4), 0)):
        with pytest.raises(ValueError, match="does not fit"):
            pack_into(both, weight, block, step=2)


def grid_search(group: list[float]) -> float:
    """The least squared error of a group of 32 numbers on the grids that int4 tries, in plain float64 but for the scale's fp16."""
    top = max(group, key=abs)
    least = sum(x * x for x in group)
    for quarter in range(26, 45) if top else ():
        whole = [min(7, max(-8, round(x * -quarter / 4 / top))) for x in group]
        scale = float(torch.tensor(sum(x * q for x, q in zip(group, whole, strict=True)) / sum(q * q for q in whole)).half())
        if scale:
            least = min(least, sum((x - scale * min(7, max(-8, round(x / scale))))**2 for x in group))
    return least


def test_int4_is_never_worse_than_the_grid_search_that_defines_it() -> None:
    g = torch.Generator().manual_seed(8)
    weight = torch.randn(48, 64, generator=g) * torch.logspace(-6, 4, 48)[:, None]
    weight[7] = 0
    weight[9] = torch.randint(-3, 3, (64,), generator=g).float()
    weight[11, 1:32] *= 1e-4
    errors = ((unpack(pack(weight, "int4")) - weight)**2).view(48, 2, 32).sum(-1)
    for row in range(48):
        for number, group in enumerate(weight[row].view(2, 32).tolist()):
            assert errors[row, number] <= grid_search(group) * (1 + 1e-5), (row, number)


@pytest.mark.parametrize("wrong", ["token", "negative token", "position", "page", "sequence", "table", "wanted"])
def test_what_lies_outside_is_refused(wrong: str) -> None:
    engine = Engine(source_of_model(model_of(), "bf16"), 2)
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    numbers = {"tokens": 3, "positions": 20, "sequences": 0, "wanted": 0}
    arguments = {name: torch.tensor([value]) for name, value in numbers.items()} | {"tables": table}
    changes = {
        "token": ("tokens", torch.tensor([300])), "negative token": ("tokens", torch.tensor([-1])),
        "position": ("positions", torch.tensor([32])),
        "page": ("tables", torch.tensor([[0, 2]], dtype=torch.int32)), "sequence": ("sequences", torch.tensor([1])),
        "table": ("tables", torch.tensor([[-1, 0]], dtype=torch.int32)), "wanted": ("wanted", torch.tensor([1])),
    }
    engine.step(**arguments)
    name, value = changes[wrong]
    with pytest.raises(ValueError, match="lies outside the model or its cache"):
        engine.step(**arguments | {name: value})


def test_a_shape_that_the_engine_cannot_take_is_said() -> None:
    config = preset("pico")
    with pytest.raises(UserError, match=r"the native engine cannot run this model: head_dim 8 is not a multiple of 32"):
        Engine(source_of_model(initialize(LingForCausalLM(config), 0), "bf16"), 4)
