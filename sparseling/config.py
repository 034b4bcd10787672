"""ModelConfig: the public `config.json` of Ling 2.0, field for field, and the presets.

Reads every spelling in which the public checkpoints come: `model_type` `bailing_moe`, `bailing_moe_v2` or none, half RoPE as
`partial_rotary_factor`, `rotary_dim` or `rope_parameters`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError, UserError, nearest
from .files import read_json

ARCHITECTURE = "BailingMoeV2ForCausalLM"
MODEL_TYPES = ("bailing_moe", "bailing_moe_v2", ARCHITECTURE)
# What a key that config.json leaves out means to the public config class, where that is not the value of Ling-mini-2.0 below.
PUBLIC_DEFAULTS = {"routed_scaling_factor": 1.0, "eos_token_id": 156892}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one model, in the public field names. Widths in elements, `rope_theta` in radians base, lengths in tokens."""

    vocab_size: int = 157184
    hidden_size: int = 2048
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 5120
    first_k_dense_replace: int = 1
    moe_intermediate_size: int = 512
    num_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    use_qk_norm: bool = True
    use_qkv_bias: bool = False
    use_bias: bool = False
    partial_rotary_factor: float = 0.5
    rope_theta: float = 600000.0
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    mtp_loss_scaling_factor: float = 0.1
    initializer_range: float = 0.006
    pad_token_id: int = 156892
    eos_token_id: int = 156895

    def __post_init__(self) -> None:
        check_shape(self)

    @property
    def rotary_dim(self) -> int:
        """How many of the `head_dim` elements of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def groups(self) -> tuple[int, int]:
        """(expert groups, groups kept); (1, 1) when grouping is off, which public configs write as 0 or 1."""
        return (self.n_group, self.topk_group) if self.n_group > 1 else (1, 1)

    @property
    def shared_expert_intermediate_size(self) -> int:
        """Width of all shared experts together; 0 when there are none."""
        return self.moe_intermediate_size * self.num_shared_experts

    def is_dense(self, layer: int) -> bool:
        """Whether decoder layer `layer` has one dense MLP instead of experts. MTP layers are never dense."""
        return layer < min(self.first_k_dense_replace, self.num_hidden_layers)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; an unknown field is a `UsageError` that names the nearest."""
        known = {field.name for field in dataclasses.fields(self)}
        for key in changes:
            if key not in known:
                raise UsageError(f"model.{key}: unknown key; {nearest(key, known)}")
        return dataclasses.replace(self, **changes)

    @staticmethod
    def from_dict(public: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """From a public config dictionary. Raises `UserError` for architectures and options that are not Ling 2.0."""
        refuse_wrong_types(public, source)
        refuse_other_architectures(public, source)
        values = PUBLIC_DEFAULTS | {f.name: public[f.name] for f in dataclasses.fields(ModelConfig) if public.get(f.name) is not None}
        values["partial_rotary_factor"] = partial_rotary_factor_of(public, source)
        rope = public.get("rope_parameters") or {}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        values["rope_scaling"] = rope_scaling_of(public)
        if public.get("head_dim") is None:
            values["head_dim"] = public.get("hidden_size", 2048) // public.get("num_attention_heads", 16)
        for key, off in (("num_shared_experts", 0), ("n_group", 1), ("topk_group", 1)):
            if key in public and not public[key]:  # null or 0: there is none; left out: as the class has it
                values[key] = off
        for key in ("eos_token_id", "pad_token_id"):
            if isinstance(values.get(key), list):
                values[key] = values[key][0]
        values["mtp_loss_scaling_factor"] = public.get("mtp_loss_scaling_factor") or 0.1
        # Published configs leave the std out; the paper gives 0.006 (L2 §3.2.1).
        return ModelConfig(**values)

    @staticmethod
    def from_folder(folder: str | Path) -> ModelConfig:
        """From `folder/config.json`."""
        path = Path(folder) / "config.json"
        return ModelConfig.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The public `config.json`, loadable by other engines (remote code of the public models)."""
        own = dataclasses.asdict(self)
        if not self.num_nextn_predict_layers:
            del own["num_nextn_predict_layers"], own["mtp_loss_scaling_factor"]
        return own | {
            "architectures": [ARCHITECTURE],
            "auto_map": {
                "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
                "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
                "AutoModelForCausalLM": f"modeling_bailing_moe_v2.{ARCHITECTURE}",
            },
            "model_type": "bailing_moe",
            "moe_shared_expert_intermediate_size": self.shared_expert_intermediate_size,
            "moe_router_enable_expert_bias": True,
            "norm_topk_prob": True,
            "score_function": "sigmoid",
            "router_dtype": "fp32",
            "hidden_act": "silu",
            "use_rmsnorm": True,
            "use_cache": True,
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "output_dropout": 0.0,
        }


def check_shape(config: ModelConfig) -> None:
    """Raise `UserError` for a shape that cannot be computed, naming the field and the mend."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wanted = {"int": (int,), "float": (int, float), "bool": (bool,)}.get(str(field.type))
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            raise UserError(f"model.{field.name}: {value!r} is not {'an' if field.type == 'int' else 'a'} {field.type}")
    may_be_zero = {"first_k_dense_replace", "num_shared_experts", "num_nextn_predict_layers", "pad_token_id", "eos_token_id"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (value < 0 or (value == 0 and field.name not in may_be_zero)):
            raise UserError(f"model.{field.name}: {value} is not positive")
    experts, (groups, kept) = config.num_experts, config.groups
    rules = [
        (config.num_attention_heads % config.num_key_value_heads == 0, "num_attention_heads", "must be a multiple of num_key_value_heads"),
        (config.rotary_dim % 2 == 0 and 0 < config.rotary_dim <= config.head_dim, "partial_rotary_factor",
         f"times head_dim {config.head_dim} must be an even number of rotated elements"),
        (experts % groups == 0, "num_experts", f"must be a multiple of n_group {groups}"),
        (groups == 1 or experts // groups >= 2, "n_group", "must leave at least two experts in a group"),
        (1 <= kept <= groups, "topk_group", f"must lie between 1 and n_group {groups}"),
        (config.num_experts_per_tok <= kept * (experts // groups), "num_experts_per_tok",
         f"must not exceed the {kept * (experts // groups)} experts of the kept groups"),
    ]
    for fine, field_name, what in rules:
        if not fine:
            raise UserError(f"model.{field_name}: {getattr(config, field_name)} {what}")


def refuse_wrong_types(public: Any, source: str) -> None:
    """A config is an object, its numbers are numbers, and its RoPE settings are objects; else `UserError`."""
    if not isinstance(public, dict):
        raise UserError(f"{source}: is not a JSON object with the fields of a model; give a model's config.json")
    if not {"architectures", "model_type", "hidden_size"} & set(public):
        raise UserError(f"{source}: describes no model (no architectures, model_type or hidden_size); give a model's config.json")
    for key in ("rope_scaling", "rope_parameters"):
        if public.get(key) is not None and not isinstance(public[key], dict):
            raise UserError(f"{source}: {key} is {public[key]!r}; write an object such as {{\"type\": \"yarn\", \"factor\": 4.0}} or null")
    for key in ("hidden_size", "num_attention_heads", "head_dim", "rotary_dim", "partial_rotary_factor"):
        if public.get(key) is not None and (isinstance(public[key], bool) or not isinstance(public[key], (int, float)) or public[key] <= 0):
            raise UserError(f"{source}: {key} is {public[key]!r}, not a positive number; mend the file")


def refuse_other_architectures(public: dict[str, Any], source: str) -> None:
    """Ling 2.0 shares its `model_type` with the older Ling: the architecture's name decides."""
    if public.get("architectures"):
        if ARCHITECTURE not in public["architectures"]:
            raise UserError(f"{source}: architectures is {public['architectures']}, not {ARCHITECTURE}; only Ling 2.0 models can be read")
    elif public.get("model_type", "bailing_moe") not in MODEL_TYPES:
        raise UserError(f"{source}: model_type is '{public['model_type']}', not one of {', '.join(MODEL_TYPES)}; only Ling 2.0 models can "
                        "be read")
    required = {"score_function": "sigmoid", "hidden_act": "silu", "use_rmsnorm": True, "norm_head": False, "norm_softmax": False}
    for key, value in required.items():
        if public.get(key) is not None and public[key] != value:
            raise UserError(f"{source}: {key} is {public[key]!r}, Ling 2.0 has {value!r}; this model cannot be read")


def partial_rotary_factor_of(public: dict[str, Any], source: str) -> float:
    """Explicit factor, else `rotary_dim / head_dim` (Ling-1T), else 1.0 as the public code has it."""
    for place in (public, public.get("rope_parameters") or {}, public.get("rope_scaling") or {}):
        if place.get("partial_rotary_factor") is not None:
            return float(place["partial_rotary_factor"])
    if public.get("rotary_dim") is not None:
        head_dim = public.get("head_dim") or public["hidden_size"] // public["num_attention_heads"]
        if public["rotary_dim"] > head_dim:
            raise UserError(f"{source}: rotary_dim {public['rotary_dim']} exceeds head_dim {head_dim}")
        return float(public["rotary_dim"] / head_dim)
    return 1.0


def rope_scaling_of(public: dict[str, Any]) -> dict[str, Any] | None:
    """The YaRN settings, from `rope_scaling` or the newer `rope_parameters`; None for plain RoPE."""
    scaling = public.get("rope_scaling") or public.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    return {k: v for k, v in scaling.items() if k not in ("rope_theta", "partial_rotary_factor")}


LING_MINI = ModelConfig()
LING_FLASH = LING_MINI.replace(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=9216, moe_intermediate_size=1024
)
LING_1T = LING_MINI.replace(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=18432,
    first_k_dense_replace=4, moe_intermediate_size=2048,
)
# The small ladder keeps the recipe's proportions: one dense layer first, granularity 2d / width = 8, about one expert in sixteen
# active, half RoPE, MTP. Its std is larger than the published 0.006, which suits hidden sizes of thousands.
NANO = ModelConfig(
    vocab_size=4096, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    intermediate_size=320, moe_intermediate_size=32, num_experts=64, num_experts_per_tok=4, n_group=8, topk_group=4,
    rope_theta=10000.0, max_position_embeddings=512, num_nextn_predict_layers=1, initializer_range=0.02, pad_token_id=1, eos_token_id=4,
)
PRESETS: dict[str, ModelConfig] = {
    "pico": NANO.replace(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, intermediate_size=64,
        moe_intermediate_size=8, num_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, max_position_embeddings=256,
    ),
    "nano": NANO,
    "micro": NANO.replace(
        vocab_size=16384, hidden_size=256, num_hidden_layers=8, num_attention_heads=8, intermediate_size=640, moe_intermediate_size=64,
        max_position_embeddings=2048, num_experts_per_tok=8, num_experts=128,
    ),
    "milli": NANO.replace(
        vocab_size=32768, hidden_size=512, num_hidden_layers=12, num_attention_heads=8, head_dim=64, intermediate_size=1280,
        moe_intermediate_size=128, num_experts=256, num_experts_per_tok=8, max_position_embeddings=4096, initializer_range=0.012,
    ),
    "ling-mini-2.0": LING_MINI,
    "ling-flash-2.0": LING_FLASH,
    "ling-1t": LING_1T,
}


def preset(name: str) -> ModelConfig:
    """A preset by name; an unknown one is a `UsageError` that names the nearest."""
    if name not in PRESETS:
        raise UsageError(f"model '{name}': no such preset; {nearest(name, PRESETS)}")
    return PRESETS[name]
