"""The public names: counts and shapes against the published figures, the golden files and the model itself."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open

from sparseling.accounting import count_parameters
from sparseling.checkpoint.hf import empty_model
from sparseling.checkpoint.names import config_as_stored, expected_tensors, public_views
from sparseling.config import ModelConfig, preset
from sparseling.errors import UserError

from .checkpoint_samples import CHAT, GOLDEN, SMALL, made_model, public_tensors


@pytest.mark.parametrize(
    ("name", "tensors", "parameters", "biases"),
    [
        ("ling-mini-2.0", 14_813, 16_255_638_528, 4_864),
        ("ling-flash-2.0", 24_161, 102_889_697_280, 7_936),
        ("ling-1t", 59_243, 999_705_309_184, 19_456),
    ],
)
def test_published_models_have_the_published_tensor_and_element_counts(name: str, tensors: int, parameters: int, biases: int) -> None:
    expected = expected_tensors(preset(name))
    assert len(expected) == tensors
    assert sum(math.prod(shape) for shape, kind in expected.values() if kind == "weight") == parameters
    assert sum(math.prod(shape) for shape, kind in expected.values() if kind == "float32") == biases


def test_published_total_with_one_mtp_layer() -> None:
    config = preset("ling-mini-2.0").replace(num_nextn_predict_layers=1)
    weights = sum(math.prod(shape) for shape, kind in expected_tensors(config).values() if kind == "weight")
    assert weights == 17_083_499_776


@pytest.mark.parametrize("folder", ["fp32", "fp32-mtp", "bf16"])
def test_names_and_shapes_equal_those_the_public_implementation_wrote(folder: str) -> None:
    with safe_open(GOLDEN / folder / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
    expected = expected_tensors(ModelConfig.from_folder(GOLDEN / folder))
    assert {name: shape for name, (shape, _) in expected.items()} == stored


VARIANTS = [
    SMALL, CHAT, SMALL.replace(num_nextn_predict_layers=2), SMALL.replace(use_bias=True, use_qkv_bias=True),
    CHAT.replace(use_qk_norm=False), CHAT.replace(num_shared_experts=0), CHAT.replace(num_shared_experts=2),
    CHAT.replace(first_k_dense_replace=3),
]


@pytest.mark.parametrize("config", VARIANTS)
def test_model_in_memory_has_exactly_the_expected_tensors(config: ModelConfig) -> None:
    views = dict(public_views(empty_model(config, torch.float32).state_dict()))
    expected = expected_tensors(config)
    assert {name: tuple(view.shape) for name, view in views.items()} == {name: shape for name, (shape, _) in expected.items()}
    assert sum(math.prod(s) for s, kind in expected.values() if kind == "weight") == count_parameters(config).total


def test_tied_head_is_not_stored() -> None:
    tied = expected_tensors(CHAT.replace(tie_word_embeddings=True))
    assert expected_tensors(CHAT).keys() - tied.keys() == {"lm_head.weight"}


def test_views_share_memory_with_the_model_and_hold_the_right_rows() -> None:
    model = made_model()
    views, copies = dict(public_views(model.state_dict())), public_tensors(model)
    assert views.keys() == copies.keys()
    assert all(torch.equal(views[name], copies[name]) for name in copies)
    views["model.layers.2.mlp.experts.5.up_proj.weight"].fill_(7.0)
    stacked = model.state_dict()["model.layers.2.mlp.experts.gate_up_proj"]
    assert (stacked[5, 16:] == 7).all() and int((stacked == 7).sum()) == 16 * 32


def mtp_names(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.eh_proj.weight" for layer in layers]


@pytest.mark.parametrize(
    ("layers", "promised", "marked", "decoder", "ahead"),
    [
        (20, 1, [20], 20, 1),      # Ling-V2: after the decoder layers
        (20, 0, [20], 20, 1),      # config silent: the weights decide
        (21, 1, [20], 20, 1),      # Ring-V2: the last of num_hidden_layers
        (22, 2, [20, 21], 20, 2),
        (21, 0, [20], 20, 1),
        (20, 1, [], 20, 0),        # chat checkpoint with a promise it does not keep
        (20, 2, [20], 20, 2),      # one of two is missing: still promised, so it will be named
    ],
)
def test_both_mtp_numberings_are_told_apart_by_eh_proj(layers: int, promised: int, marked: list[int], decoder: int, ahead: int) -> None:
    config = CHAT.replace(num_hidden_layers=layers, num_nextn_predict_layers=promised)
    stored = config_as_stored(config, [*mtp_names(*marked), "model.layers.0.input_layernorm.weight"], "folder")
    assert (stored.num_hidden_layers, stored.num_nextn_predict_layers) == (decoder, ahead)


@pytest.mark.parametrize("marked", [[0], [1], [1, 3]])
def test_an_mtp_layer_among_the_decoder_layers_is_refused(marked: list[int]) -> None:
    with pytest.raises(UserError, match=f"layer {marked[0]} is an MTP layer"):
        config_as_stored(CHAT, mtp_names(*marked), "folder")
