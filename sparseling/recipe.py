"""A recipe: one YAML file from data to answers. Its keys, their units and defaults are the dataclasses below, and nothing else.

`sparseling recipe --keys` prints them. Defaults are the published Ling 2.0 settings where the papers give one.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import ModelConfig, preset
from .errors import UsageError, nearest
from .schema import describe, key, parse, path

DOMAINS = ("prose", "tech", "code", "math", "chat", "worked")


@dataclass(frozen=True, kw_only=True)
class LocalFiles:
    """Text of the user's own."""

    path: str = key("file or folder: .txt, .md, or JSON lines with a text field")
    domain: str = key("which domain it counts to: " + ", ".join(DOMAINS), "prose")
    licence: str = key("its licence, printed and kept in the manifest", "not stated")


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A Hugging Face dataset (needs a network and the `datasets` extra)."""

    name: str = key("hub id, e.g. HuggingFaceFW/fineweb-edu")
    split: str = key("split to read", "train")
    field: str = key("column that holds the text", "text")
    domain: str = key("which domain it counts to: " + ", ".join(DOMAINS), "prose")
    licence: str = key("its licence, printed and kept in the manifest", "see the dataset's page")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where text comes from and how much of it is kept."""

    preset: Literal["none", "small", "base", "full"] = key("packaged corpora: small 172 MB, base 1.1 GB, full 2.4 GB", "small")
    files: tuple[LocalFiles, ...] = key("your own text", ())
    huggingface: tuple[HubDataset, ...] = key("Hugging Face datasets", ())
    validation_share: float = key("share of documents held out, chosen by hash", 0.01, unit="share")
    max_bytes: dict[str, int] = key("most training text kept of a domain, e.g. {prose: 12MB}", {}, unit="bytes")


@dataclass(frozen=True, kw_only=True)
class Worked:
    """Generated problems with worked solutions: the `worked` domain."""

    tasks: tuple[str, ...] = key("task families; `sparseling recipe --tasks` lists them", ())
    bytes: int = key("training text to write", 0, unit="bytes")
    steps_share: float = key("share of problems that show their steps", 0.9, unit="share")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The byte-level BPE tokenizer."""

    vocab_size: int = key("rows wanted, special tokens included", 4096, low=300)
    sample_bytes: int = key("text that it is trained on, all domains in the share they have", 8_000_000, unit="bytes")
    folder: str | None = key("use this tokenizer instead of training one (e.g. the public 157k one)", None)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text to tokens."""

    documents: Documents = key("sources", Documents())
    worked: Worked = key("generated worked solutions", Worked())
    tokenizer: TokenizerSettings = key("tokenizer", TokenizerSettings())
    validation_tokens: int = key("tokens of each domain that validation reads", 16384, unit="tokens")


@dataclass(frozen=True, kw_only=True)
class Share:
    """One side of the mixture."""

    share: float = key("share of the samples", unit="share")
    domains: dict[str, float] = key("weights of the domains within this side, e.g. {math: 1, code: 2}", low=0.0)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its constant learning rate (L2 §3.2.1)."""

    learning_rate: float = key("peak, reached after the warm-up and then constant", low=0.0)
    warmup_steps: int = key("steps of linear warm-up", 2000, unit="steps")
    weight_decay: float = key("on matrices only", 0.1, low=0.0)
    beta1: float = key("AdamW beta 1", 0.9, low=0.0, high=1.0)
    beta2: float = key("AdamW beta 2", 0.95, low=0.0, high=1.0)
    clip_norm: float = key("gradient norm is clipped here", 1.0, low=0.0)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Next-token training on a mixture; mid-training is the same with other data and `start: continue`."""

    name: str = key("folder of the stage in the run")
    kind: Literal["pretrain"] = key("pretrain")
    tokens: int = key("tokens to train on", unit="tokens")
    mixture: dict[str, Share] = key("sides of the mixture, e.g. general and reasoning; their shares sum to 1")
    optimizer: Optimizer = key("optimiser")
    start: Literal["fresh", "continue", "weights"] = key(
        "fresh weights; continue with weights and optimiser of the stage before; or only its weights", "fresh")
    seq_length: int = key("tokens of one sequence", 4096, unit="tokens", low=8)
    batch_sequences: int = key("sequences of one optimiser step", unit="sequences", low=1)
    batch_start_sequences: int | None = key("sequences of the first step; then a linear ramp", None, unit="sequences", low=1)
    batch_ramp_tokens: int = key("tokens over which the batch grows", 0, unit="tokens")
    micro_batch_sequences: int = key("sequences computed at once (memory)", 16, unit="sequences", low=1)
    mtp_loss_weight: float = key("weight of the multi-token prediction loss", 0.1, low=0.0)
    router_z_loss_weight: float = key("weight of the router z-loss", 3.5e-6, low=0.0)
    bias_update_rate: float = key("step of the balance bias: 1e-3 in 4K pre-training, 1e-4 later", 1e-3, low=0.0)
    rope_theta: float | None = key("RoPE base from this stage on", None, low=1.0)
    max_position_embeddings: int | None = key("context length from this stage on", None, unit="tokens", low=1)
    snapshots: int = key("weights kept for merging, evenly spaced to the end of the stage", 0, low=0)
    validate_every: int = key("steps between validations; 0: at the end only", 0, unit="steps")
    checkpoint_every: int = key("steps between checkpoints", 200, unit="steps", low=1)


@dataclass(frozen=True, kw_only=True)
class Sft:
    """Supervised fine-tuning in both thinking modes; the balance bias is frozen."""

    name: str = key("folder of the stage in the run")
    kind: Literal["sft"] = key("sft")
    optimizer: Optimizer = key("optimiser")
    tasks: tuple[str, ...] = key("task families to write conversations of", ())
    samples: int = key("conversations of the task families", 0, low=0)
    thinking_share: float = key("share of them that think", 0.5, unit="share")
    talk_share: float = key("share of them that are small talk", 0.02, unit="share")
    files: tuple[str, ...] = key('JSON lines of {"messages": [...]}', ())
    epochs: int = key("passes over all conversations", 1, low=1)
    seq_length: int = key("tokens of one packed row", 4096, unit="tokens", low=8)
    batch_sequences: int = key("rows of one optimiser step", unit="sequences", low=1)
    micro_batch_sequences: int = key("rows computed at once (memory)", 16, unit="sequences", low=1)
    mtp_loss_weight: float = key("weight of the multi-token prediction loss", 0.1, low=0.0)
    router_z_loss_weight: float = key("weight of the router z-loss", 3.5e-6, low=0.0)
    snapshots: int = key("weights kept for merging, evenly spaced to the end of the stage", 0, low=0)
    validate_every: int = key("steps between validations; 0: at the end only", 0, unit="steps")
    checkpoint_every: int = key("steps between checkpoints", 200, unit="steps", low=1)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """WSM: merge snapshots of a training stage instead of decaying its learning rate."""

    name: str = key("folder of the stage in the run")
    kind: Literal["merge"] = key("merge")
    of: str | None = key("training stage whose snapshots are merged; default: the last one before", None)
    curve: str = key("mean, linear, cosine, 1-sqrt or ema", "mean")
    decay: tuple[float, ...] = key("own decay factors, one fewer than snapshots, instead of a curve", (), low=0.0, high=1.0)
    last: int | None = key("merge this many of the newest snapshots; default: all", None, low=1)
    top: int | None = key("merge this many of the best by validation instead", None, low=1)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Exact-match accuracy on held-out problems, both modes, with intervals."""

    name: str = key("folder of the stage in the run")
    kind: Literal["eval"] = key("eval")
    tasks: tuple[str, ...] = key("task families")
    problems: int = key("held-out problems of each family", 200, low=1)
    modes: tuple[Literal["off", "on"], ...] = key("thinking modes", ("off", "on"))
    stages: tuple[str, ...] = key("stages whose models are evaluated, the last one is the run's result; default: the last model", ())


Stage = Pretrain | Sft | Merge | Eval
KINDS: dict[str, type[Any]] = {"pretrain": Pretrain, "sft": Sft, "merge": Merge, "eval": Eval}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    name: str
    model: ModelConfig
    data: Data
    stages: tuple[Stage, ...]
    seed: int = 0
    threads: int = 2


@dataclass(frozen=True, kw_only=True)
class Top:
    """Keys of the file itself; `model` and `stages` are read by functions of their own."""

    name: str = key("name of the run: its folder is runs/NAME")
    model: dict[str, Any] = key("`preset`, and any field of the public config.json to change it")
    data: Data = key("text to tokens")
    stages: tuple[Any, ...] = key("list of stages, in order; each has a name and a kind: " + ", ".join(KINDS))
    seed: int = key("every random choice follows from it", 0, low=0)
    threads: int = key("CPU threads; weights are bit-exact for a fixed number", os.cpu_count() or 1, low=1)


def load_recipe(file: str | Path) -> Recipe:
    """Read and validate a recipe. Raises `UsageError` naming file, key and mend."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror}); give a recipe such as recipes/laptop.yaml") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file}: is not text in UTF-8; give a recipe such as recipes/laptop.yaml") from None
    try:
        return recipe_from(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: is not valid YAML ({' '.join(str(error).split())}); mend that line") from None
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def recipe_from(values: Any) -> Recipe:
    """A recipe from parsed YAML."""
    top = parse(Top, values, "")
    if not top.name or not all(c.isalnum() or c in "-_." for c in top.name) or top.name.startswith("."):
        raise UsageError(f"name: '{top.name}' cannot be a folder name; use letters, digits, '-', '_' and '.'")
    stages = tuple(stage_from(values, position) for position, values in enumerate(top.stages))
    recipe = Recipe(name=top.name, model=model_from(top.model), data=top.data, stages=stages, seed=top.seed, threads=top.threads)
    check_recipe(recipe)
    return recipe


def model_from(values: dict[str, Any]) -> ModelConfig:
    """The model of a recipe: a preset, with fields changed."""
    changes = dict(values)
    base = preset(str(changes.pop("preset"))) if "preset" in changes else None
    if base is None:
        raise UsageError("model.preset: missing; name one, e.g. preset: nano")
    for name, value in changes.items():
        if isinstance(value, str) and name != "rope_scaling":
            try:
                changes[name] = float(value)  # YAML reads 1e-3 as text
            except ValueError:
                raise UsageError(f"model.{name}: '{value}' is not a number") from None
    return base.replace(**changes)


def stage_from(values: Any, position: int) -> Stage:
    """One stage by its kind."""
    where = f"stages[{position}]"
    if not isinstance(values, dict) or "kind" not in values:
        raise UsageError(f"{where}.kind: missing; one of {', '.join(KINDS)}")
    if values["kind"] not in KINDS:
        raise UsageError(f"{where}.kind: '{values['kind']}' is unknown; {nearest(str(values['kind']), KINDS)}")
    where = f"stages.{values['name']}" if isinstance(values.get("name"), str) else where
    stage: Stage = parse(KINDS[values["kind"]], values, where)
    return stage


def check_recipe(recipe: Recipe) -> None:
    """Rules between keys; a `UsageError` names the key and the mend."""
    names: list[str] = []
    context = recipe.model.max_position_embeddings
    for stage in recipe.stages:
        where = f"stages.{stage.name}"
        if stage.name in (*names, "data") or not stage.name.replace("-", "").replace("_", "").isalnum():
            raise UsageError(f"{where}.name: '{stage.name}' is taken or no folder name; choose another of letters, digits and '-'")
        trained = [s for s in recipe.stages[: len(names)] if isinstance(s, (Pretrain, Sft))]
        if isinstance(stage, Pretrain):
            context = stage.max_position_embeddings or context
            check_pretrain(stage, where, bool(trained))
        elif isinstance(stage, Sft) and not (stage.samples and stage.tasks) and not stage.files:
            raise UsageError(f"{where}.samples: nothing to train on; give tasks and samples, or files")
        elif isinstance(stage, Merge):
            sources = {s.name: s for s in trained}
            if not sources or (stage.of is not None and stage.of not in sources):
                raise UsageError(f"{where}.of: no training stage '{stage.of or ''}' before this one; {nearest(stage.of or '', sources)}")
            source = sources[stage.of or trained[-1].name]
            if not source.snapshots:
                raise UsageError(f"stages.{source.name}.snapshots: 0 leaves nothing for {stage.name} to merge; set it, e.g. to 8")
        elif isinstance(stage, Eval):
            for name in stage.stages:
                if name not in names:
                    raise UsageError(f"{where}.stages: no stage '{name}' before this one; {nearest(name, names)}")
        if isinstance(stage, (Pretrain, Sft)) and stage.seq_length > context:
            raise UsageError(f"{where}.seq_length: {stage.seq_length} exceeds the context of {context}; raise "
                             "max_position_embeddings or lower this")
        if isinstance(stage, (Sft, Eval)):
            check_tasks(stage.tasks, where)
        names.append(stage.name)
    check_tasks(recipe.data.worked.tasks, "data.worked")
    if not recipe.stages or not isinstance(recipe.stages[0], (Pretrain, Sft)):
        raise UsageError("stages: the first stage must train (kind: pretrain)")


def check_pretrain(stage: Pretrain, where: str, trained_before: bool) -> None:
    """Shares sum to 1, domains exist, and there is something to continue."""
    total = sum(side.share for side in stage.mixture.values())
    if abs(total - 1) > 1e-6:
        raise UsageError(f"{where}.mixture: the shares sum to {total:g}, not 1; change one of {', '.join(stage.mixture)}")
    for side_name, side in stage.mixture.items():
        for domain in side.domains:
            if domain not in DOMAINS:
                raise UsageError(f"{path(where, 'mixture')}.{side_name}.domains.{domain}: unknown domain; {nearest(domain, DOMAINS)}")
        if side.share and not sum(side.domains.values()):
            raise UsageError(f"{where}.mixture.{side_name}.domains: the weights sum to 0; give at least one domain a weight")
    if stage.start != "fresh" and not trained_before:
        raise UsageError(f"{where}.start: '{stage.start}' needs a stage before it; use fresh")


def check_tasks(tasks: tuple[str, ...], where: str) -> None:
    """Every task family exists."""
    from .study.tasks.families import FAMILIES

    for task in tasks:
        if task not in FAMILIES:
            raise UsageError(f"{where}.tasks: no task '{task}'; {nearest(task, FAMILIES)}")


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; it loads to the same recipe."""
    values = dataclasses.asdict(recipe)
    values["model"] = {"preset": "nano", **values["model"]}
    return yaml.safe_dump(plain(values), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Tuples as lists, bytes with their unit left out of the way: what YAML and JSON can say."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def document_keys() -> str:
    """Every key of a recipe with its meaning, unit and default."""
    lines = list(describe(Top))
    for kind, cls in KINDS.items():
        lines += ["", f"stages, kind: {kind} - {cls.__doc__}", *describe(cls, 1)]
    return "\n".join(lines)
