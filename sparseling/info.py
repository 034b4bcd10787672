"""What a model is, by any name a user may give it: preset, folder, config file, recipe, run folder, hub id."""

from __future__ import annotations

from pathlib import Path

from .accounting import count_parameters, forward_flops_per_token, kv_bytes_per_token, law_flops_per_token, training_flops_per_token
from .config import PRESETS, ModelConfig
from .errors import UserError, nearest
from .files import read_json


def config_of(model: str) -> ModelConfig:
    """The config behind a preset name, a folder, a config.json, a recipe file, a run folder, or a hub id (only its config is fetched)."""
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if path.suffix in (".yaml", ".yml"):
        from .recipe import load_recipe

        return load_recipe(path).model
    if path.is_file():
        if path.suffix != ".json":
            raise UserError(f"{model}: is no config.json, recipe (.yaml) or model folder; give one of them")
        return ModelConfig.from_dict(read_json(path), model)
    if path.is_dir():
        return ModelConfig.from_folder(model_folder(model))
    if model.count("/") == 1 and not path.exists():
        from .checkpoint.hub import resolve

        return ModelConfig.from_folder(resolve(model, weights=False))
    raise UserError(f"'{model}': no such preset, folder or file; {nearest(model, PRESETS)}")


def model_folder(model: str) -> Path:
    """The model folder that `model` means: a run folder gives the model of its last stage that left one, a stage folder its own; a hub id
    is downloaded."""
    path = Path(model)
    if (path / "recipe.yaml").is_file():
        from .recipe import load_recipe

        for stage in reversed(load_recipe(path / "recipe.yaml").stages):
            if (path / stage.name / "done.json").exists() and (path / stage.name / "model").is_dir():
                return path / stage.name / "model"
        raise UserError(f"{path}: no stage of this run has left a model yet; run it further with: sparseling run {path}")
    if (path / "model" / "config.json").is_file():  # a stage of a run
        return path / "model"
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path}: is no run, stage or model folder (no recipe.yaml, model/ or config.json in it); give e.g. runs/laptop")
    from .checkpoint.hub import resolve

    return resolve(model)


def tasks_of_run(model: str) -> tuple[str, ...]:
    """The task families that the last eval stage of a run folder asks; () for anything else."""
    from .recipe import Eval, load_recipe

    path = Path(model) / "recipe.yaml"
    stages = load_recipe(path).stages if path.is_file() else ()
    return next((stage.tasks for stage in reversed(stages) if isinstance(stage, Eval)), ())


def figures(config: ModelConfig, seq_length: int) -> dict[str, int]:
    """The figures of `sparseling info --json`.

    `flops_per_token` is M of the scaling laws: forward and backward, without embeddings, head and router (accounting.law_flops_per_token);
    the others say what they count in their names. `kv_bytes_per_token` is for bf16.
    """
    parameters = count_parameters(config)
    return {
        "parameters_total": parameters.total,
        "parameters_active": parameters.active,
        "parameters_active_non_embedding": parameters.active_non_embedding,
        "parameters_mtp": parameters.mtp,
        "flops_per_token": law_flops_per_token(config, seq_length),
        "flops_per_token_forward": forward_flops_per_token(config, seq_length, head=True),
        "flops_per_token_training": training_flops_per_token(config, seq_length),
        "seq_length": seq_length,
        "kv_bytes_per_token": kv_bytes_per_token(config),
    }


def table(name: str, config: ModelConfig, seq_length: int) -> str:
    """The same figures for people, with the shape of the model."""
    parameters, numbers = count_parameters(config), figures(config, seq_length)
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    groups, kept = config.groups
    rows = [
        ("layers", f"{config.num_hidden_layers} ({dense} dense first), {config.num_nextn_predict_layers} for multi-token prediction"),
        ("hidden size", f"{config.hidden_size:,}"),
        ("attention", f"{config.num_attention_heads} heads of {config.head_dim}, {config.num_key_value_heads} for keys and values, "
                      f"{config.rotary_dim} of {config.head_dim} rotated"),
        ("experts", f"{config.num_experts} routed of width {config.moe_intermediate_size}, {config.num_experts_per_tok} a token, "
                    f"{config.num_shared_experts} shared; {kept} of {groups} groups"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("", ""),
        ("parameters, total", f"{parameters.total:,}"),
        ("  of that multi-token prediction", f"{parameters.mtp:,}"),
        ("parameters, active", f"{parameters.active:,}"),
        ("parameters, active without embeddings", f"{parameters.active_non_embedding:,}"),
        ("FLOPs a token, scaling laws' M", f"{numbers['flops_per_token']:.4g}  (at {seq_length:,} tokens of context)"),
        ("FLOPs a token, forward with head", f"{numbers['flops_per_token_forward']:.4g}"),
        ("FLOPs a token, training", f"{numbers['flops_per_token_training']:.4g}"),
        ("KV cache a token, bf16", f"{numbers['kv_bytes_per_token']:,} bytes"),
        ("weights in bf16", f"{2 * parameters.total / 2**30:,.2f} GiB"),
    ]
    return "\n".join([name, *(f"  {label:<38}{value}".rstrip() for label, value in rows)])
