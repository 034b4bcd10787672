"""Merging (WSM): published weights, the identity 'merge of a constant-rate run = decayed updates', folders against a plain sum."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparseling.checkpoint.decay import choose_top, merge_weights
from sparseling.checkpoint.hf import load_model, read_tensors
from sparseling.checkpoint.merge import merge_folders, weighted_sum
from sparseling.errors import UserError

from .checkpoint_samples import CHAT, SMALL, files_of, made_model, public_tensors, write_public, write_sharded, write_tokenizer

# WSM Fig. 2 and the same rule for the other curves, ten checkpoints, oldest first.
PUBLISHED = {
    "linear": [0.1] * 10,
    "mean": [0.1] * 10,
    "1-sqrt": [0.3162, 0.1310, 0.1005, 0.0847, 0.0747, 0.0675, 0.0621, 0.0578, 0.0543, 0.0513],
    "cosine": [0.0245, 0.0710, 0.1106, 0.1394, 0.1545, 0.1545, 0.1394, 0.1106, 0.0710, 0.0245],
    "ema": [0.126, 0.033, 0.041, 0.052, 0.065, 0.082, 0.103, 0.130, 0.163, 0.206],
}
NAMED = sorted(PUBLISHED)


# --- Curves to weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", NAMED)
def test_weights_for_ten_checkpoints_equal_the_published_ones(curve: str) -> None:
    digits = 3 if curve == "ema" else 4
    assert [round(weight, digits) for weight in merge_weights(curve, 10)] == PUBLISHED[curve]


@pytest.mark.parametrize("curve", NAMED)
@pytest.mark.parametrize("checkpoints", [1, 2, 3, 32, 200])
def test_weights_are_a_mean(curve: str, checkpoints: int) -> None:
    weights = merge_weights(curve, checkpoints)
    assert len(weights) == checkpoints and min(weights) > 0
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-14)


decays = st.lists(st.floats(0, 1), min_size=0, max_size=30).map(lambda values: sorted(values, reverse=True))


@given(decay=decays)
def test_any_falling_curve_is_got_back_from_its_weights(decay: list[float]) -> None:
    weights = merge_weights(decay, len(decay) + 1)
    assert len(weights) == len(decay) + 1 and min(weights) >= 0
    for i, factor in enumerate(decay, start=1):  # w_i = c_i + ... + c_k
        assert math.fsum(weights[i:]) == pytest.approx(factor, abs=1e-14)


@pytest.mark.parametrize(
    ("curve", "checkpoints", "words"),
    [
        ([0.5, 0.6], 3, "factor 2 is 0.6, expected a number from 0 to 0.5"),
        ([1.1, 0.5], 3, "factor 1 is 1.1, expected a number from 0 to 1.0"),
        ([0.5, -0.1], 3, "factor 2 is -0.1"),
        ([0.5, math.nan], 3, "factor 2 is nan"),
        ([0.5], 3, "has 1 factors, 3 checkpoints need 2"),
        ([], 0, "0 cannot be merged"),
        ("mean", 0, "0 cannot be merged"),
        ("cosin", 3, "did you mean 'cosine'?"),
    ],
)
def test_wrong_curves_are_named(curve: str | list[float], checkpoints: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        merge_weights(curve, checkpoints)
    assert words in str(caught.value)


# --- The identity -------------------------------------------------------------------------------------------------------------


def trajectory(optimiser: str, steps: int, seed: int) -> list[Tensor]:
    """Snapshots [parameters] in float64, one an update, of a small net trained at a constant learning rate."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs, targets = torch.randn(64, 4, dtype=torch.float64), torch.randn(64, 1, dtype=torch.float64)
    make = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=0.01)}[optimiser]
    step = make(net.parameters())
    snapshots = [nn.utils.parameters_to_vector(net.parameters()).detach().clone()]
    for number in range(steps):
        batch = slice(number * 8 % 64, number * 8 % 64 + 8)
        step.zero_grad()
        nn.functional.mse_loss(net(inputs[batch]), targets[batch]).backward()
        step.step()
        snapshots.append(nn.utils.parameters_to_vector(net.parameters()).detach().clone())
    return snapshots


def decayed(snapshots: list[Tensor], decay: list[float]) -> Tensor:
    """theta_0 - sum_i w_i g_i with g_i = theta_(i-1) - theta_i: the run's own updates, each scaled by the decay."""
    theta = snapshots[0].clone()
    for i, factor in enumerate(decay, start=1):
        theta -= factor * (snapshots[i - 1] - snapshots[i])
    return theta


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("curve", ["linear", "cosine", "1-sqrt", "ema"])
def test_merge_of_a_constant_rate_trajectory_equals_decayed_updates(optimiser: str, curve: str) -> None:
    snapshots = trajectory(optimiser, steps=20, seed=7)
    assert (snapshots[-1] - snapshots[0]).abs().max() > 0.01  # it moved
    k = len(snapshots) - 1
    formula = {"linear": lambda t: 1 - t, "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t), "1-sqrt": lambda t: 1 - t**0.5,
               "ema": lambda t: 1 - 0.1 ** (1 - t)}[curve]
    merged = weighted_sum(snapshots, merge_weights(curve, k + 1))
    assert torch.allclose(merged, decayed(snapshots, [formula(i / (k + 1)) for i in range(1, k + 1)]), rtol=0, atol=1e-14)


@settings(max_examples=60, deadline=None)
@given(decay=decays, seed=st.integers(0, 2**31))
def test_identity_holds_for_every_falling_curve_and_every_trajectory(decay: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(len(decay) + 1, 50, generator=generator, dtype=torch.float64)
    snapshots = list(steps.cumsum(0))
    merged = weighted_sum(snapshots, merge_weights(decay, len(snapshots)))
    assert torch.allclose(merged, decayed(snapshots, decay), rtol=0, atol=1e-13)


# --- Which checkpoints --------------------------------------------------------------------------------------------------------


def test_top_by_validation_keeps_time_order() -> None:
    scores = {"a": 1.3, "b": 1.1, "c": 1.2, "d": 1.05, "e": 1.4}
    assert choose_top(scores, 3) == ["b", "c", "d"]
    assert choose_top(scores, 1) == ["d"]
    assert choose_top(scores, 99) == list("abcde")


def test_of_equal_scores_the_later_wins_and_a_diverged_checkpoint_never_does() -> None:
    scores = {"a": 1.0, "b": math.nan, "c": 1.0, "d": math.inf, "e": 2.0}
    assert choose_top(scores, 1) == ["c"]
    assert choose_top(scores, 5) == ["a", "c", "e"]
    with pytest.raises(UserError, match="no checkpoint has a finite validation score"):
        choose_top({"b": math.nan}, 1)
    with pytest.raises(UserError, match="choose at least 1"):
        choose_top(scores, 0)


# --- Folders ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Three float32 checkpoints of one run, each sharded in another way."""
    folders = []
    for seed, shards in enumerate((1, 3, 5)):
        folders.append(write_sharded(tmp_path / f"step-{seed}", SMALL, public_tensors(made_model(seed=seed)), shards))
        write_tokenizer(folders[-1])
    return folders


WEIGHTS = [0.2, 0.5, 0.3]


def plain_sum(weights: list[float]) -> dict[str, Tensor]:
    """The weighted sum of the models in memory, in float64."""
    parts = [public_tensors(made_model(seed=seed)) for seed in range(len(weights))]
    return {name: sum(w * part[name].double() for w, part in zip(weights, parts, strict=True)) for name in parts[0]}


def rounded_once(tensor: Tensor, exact: Tensor) -> bool:
    """Whether `tensor` is `exact` but for one rounding to its own dtype (and float64 noise): half a unit in the last place."""
    half_unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[tensor.dtype]
    return bool(((tensor.double() - exact).abs() <= half_unit * exact.abs() + 1e-14).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_folder_is_the_weighted_sum_rounded_once(run: list[Path], tmp_path: Path, dtype: torch.dtype) -> None:
    merge_folders(run, WEIGHTS, tmp_path / "out", dtype)
    merged, exact = dict(read_tensors(tmp_path / "out")), plain_sum(WEIGHTS)
    assert merged.keys() == exact.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == (torch.float32 if name.endswith("expert_bias") else dtype)
        assert rounded_once(tensor, exact[name]), name
    assert load_model(tmp_path / "out").config == SMALL


def test_expert_bias_is_merged_in_full_precision(run: list[Path], tmp_path: Path) -> None:
    merge_folders(run, WEIGHTS, tmp_path / "out", torch.bfloat16)
    bias = load_model(tmp_path / "out").routers()[0].expert_bias
    assert bias.dtype == torch.float32 and rounded_once(bias, plain_sum(WEIGHTS)["model.layers.1.mlp.gate.expert_bias"])


def test_merge_of_one_checkpoint_is_that_checkpoint(run: list[Path], tmp_path: Path) -> None:
    merge_folders(run[:1], merge_weights("1-sqrt", 1), tmp_path / "out")
    expected = public_tensors(made_model())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_tensors(tmp_path / "out"))


def test_merging_is_repeatable_to_the_byte_and_says_where_it_came_from(run: list[Path], tmp_path: Path) -> None:
    for out in ("first", "second"):
        merge_folders(run, WEIGHTS, tmp_path / out)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    record = json.loads((tmp_path / "first" / "merge.json").read_text())
    assert [source["weight"] for source in record["sources"]] == WEIGHTS
    assert [source["folder"] for source in record["sources"]] == [str(folder) for folder in run]
    for folder, hashes in [(tmp_path / "first", record["sha256"])] + [(Path(s["folder"]), s["sha256"]) for s in record["sources"]]:
        weights = [path for path in folder.iterdir() if "safetensors" in path.name]
        assert hashes == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    assert record["accumulated_in"] == "float64"
    assert (tmp_path / "first" / "tokenizer.json").exists()


def test_sources_of_different_dtype_merge(tmp_path: Path) -> None:
    first = write_public(tmp_path / "a", CHAT, public_tensors(made_model(CHAT), torch.bfloat16))
    second = write_public(tmp_path / "b", CHAT, public_tensors(made_model(CHAT, seed=1)))
    merge_folders([first, second], [0.5, 0.5], tmp_path / "out")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    ours = public_tensors(made_model(CHAT), torch.bfloat16)[name].double()
    theirs = public_tensors(made_model(CHAT, seed=1))[name].double()
    assert torch.equal(dict(read_tensors(tmp_path / "out"))[name], ((ours + theirs) / 2).float())


def test_another_model_is_refused_with_the_first_difference(run: list[Path], tmp_path: Path) -> None:
    write_public(tmp_path / "chat", CHAT, public_tensors(made_model(CHAT)))
    with pytest.raises(UserError, match=f"chat: num_nextn_predict_layers is 0, in {run[0]} it is 1"):
        merge_folders([run[0], tmp_path / "chat"], [0.5, 0.5], tmp_path / "out")
    turned = SMALL.replace(rope_theta=20000.0)
    write_public(tmp_path / "turned", turned, public_tensors(made_model(turned)))
    with pytest.raises(UserError, match=r"rope_theta is 20000\.0"):
        merge_folders([run[0], tmp_path / "turned"], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "words"),
    [([0.5, 0.5], "2 for 3 checkpoints"), ([0.5, 0.6, 0.1], "the sum is 1.2"), ([1.5, -0.5, 0.0], "must not be negative"),
     ([math.nan, 0.5, 0.5], "must not be negative")],
)
def test_weights_must_be_a_mean(run: list[Path], tmp_path: Path, weights: list[float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        merge_folders(run, weights, tmp_path / "out")


def test_no_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give at least one folder"):
        merge_folders([], [], tmp_path / "out")


def test_damaged_source_is_named_and_nothing_is_written(run: list[Path], tmp_path: Path) -> None:
    shard = run[1] / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"step-1/model-00002-of-00003\.safetensors: damaged or cut short"):
        merge_folders(run, WEIGHTS, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
