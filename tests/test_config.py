"""Every public spelling of the config is read; what is not Ling 2.0 is refused with the key's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparseling.config import LING_1T, LING_FLASH, LING_MINI, ModelConfig, preset
from sparseling.errors import UserError

FLASH = {
    "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe", "num_hidden_layers": 32, "hidden_size": 4096,
    "intermediate_size": 9216, "eos_token_id": 156895, "pad_token_id": 156892, "first_k_dense_replace": 1, "hidden_act": "silu",
    "max_position_embeddings": 32768, "moe_intermediate_size": 1024, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "num_attention_heads": 32, "num_experts": 256, "num_key_value_heads": 4, "rope_theta": 600000, "rope_scaling": None,
    "head_dim": 128, "num_shared_experts": 1, "vocab_size": 157184, "partial_rotary_factor": 0.5, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "use_qk_norm": True, "score_function": "sigmoid", "use_rmsnorm": True, "rms_norm_eps": 1e-06,
}


def test_published_flash_config_is_the_preset() -> None:
    assert ModelConfig.from_dict(FLASH) == LING_FLASH


@pytest.mark.parametrize(("file", "want"), [
    ("ling-flash-2.0.config.json", LING_FLASH),
    ("ling-1t.config.json", LING_1T.replace(eos_token_id=156892)),
    ("ling-mini-2.0.config.reconstructed.json", LING_MINI),
])
def test_public_config_files_beside_the_checkout(file: str, want: ModelConfig) -> None:
    path = Path(__file__).parents[2] / "shared" / "reference" / file
    if not path.exists():
        pytest.skip("the public files are not beside the checkout")
    assert ModelConfig.from_dict(json.loads(path.read_text())) == want


@pytest.mark.parametrize(("spelling", "rotated"), [
    ({"partial_rotary_factor": 0.5}, 64), ({"rotary_dim": 64}, 64), ({}, 128),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 600000, "partial_rotary_factor": 0.5}}, 64),
    ({"partial_rotary_factor": 0.25, "rotary_dim": 64}, 32),
])
def test_spellings_of_half_rope(spelling: dict, rotated: int) -> None:
    public = {k: v for k, v in FLASH.items() if k != "partial_rotary_factor"} | spelling
    assert ModelConfig.from_dict(public).rotary_dim == rotated


def test_rope_parameters_carry_theta_and_yarn() -> None:
    public = {k: v for k, v in FLASH.items() if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = ModelConfig.from_dict(public | {"rope_parameters": yarn | {"rope_theta": 12345.0, "partial_rotary_factor": 0.5}})
    assert (config.rope_theta, config.rope_scaling, config.rotary_dim) == (12345.0, yarn, 64)


@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2", "BailingMoeV2ForCausalLM"])
def test_model_types_without_architectures(model_type: str) -> None:
    public = {k: v for k, v in FLASH.items() if k != "architectures"} | {"model_type": model_type}
    assert ModelConfig.from_dict(public) == LING_FLASH


@pytest.mark.parametrize(("change", "names"), [
    ({"architectures": ["BailingMoeForCausalLM"]}, "architectures"), ({"architectures": None, "model_type": "llama"}, "model_type"),
    ({"score_function": "softmax"}, "score_function"), ({"norm_head": True}, "norm_head"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"num_experts_per_tok": 200}, "num_experts_per_tok"), ({"num_key_value_heads": 5}, "num_attention_heads"),
    ({"hidden_size": "4096"}, "hidden_size"), ({"topk_group": 9}, "topk_group"), ({"num_experts": 250}, "num_experts"),
    ({"rotary_dim": 256, "partial_rotary_factor": None}, "rotary_dim"),
])
def test_other_models_are_refused_by_key(change: dict, names: str) -> None:
    with pytest.raises(UserError, match=names):
        ModelConfig.from_dict(FLASH | change)


@pytest.mark.parametrize("name", ["pico", "nano", "ling-mini-2.0", "ling-1t"])
def test_public_form_round_trips(name: str) -> None:
    config = preset(name)
    if not config.num_nextn_predict_layers:
        assert "num_nextn_predict_layers" not in config.to_dict()
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_grouping_written_as_zero_means_none() -> None:
    assert ModelConfig.from_dict(FLASH | {"n_group": 0, "topk_group": 0}).groups == (1, 1)


def test_keys_left_out_mean_what_the_public_class_says() -> None:
    """compat: the class defaults are those of Ling-mini-2.0 but for these; an explicit null or 0 turns a feature off."""
    config = ModelConfig.from_dict({"architectures": ["BailingMoeV2ForCausalLM"]})
    assert (config.routed_scaling_factor, config.eos_token_id, config.rotary_dim) == (1.0, 156892, 128)
    assert (config.groups, config.num_shared_experts) == ((8, 4), 1)
    off = ModelConfig.from_dict({"model_type": "bailing_moe", "num_shared_experts": None, "n_group": 0, "topk_group": 0})
    assert (off.groups, off.num_shared_experts) == ((1, 1), 0)
