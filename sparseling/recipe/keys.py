"""The keys of a recipe, their units and defaults: the dataclasses below, and nothing else.

`sparseling recipe --keys` prints them. Defaults are the published Ling 2.0 settings where the papers give one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from ..config import PRESETS, ModelConfig
from ..data.sources import DOMAINS
from ..schema import describe, key

TEXT_DOMAINS = tuple(domain for domain in DOMAINS if domain != "worked")

MOST_BETA = 0.9999999  # at 1 the moments would never move


@dataclass(frozen=True, kw_only=True)
class LocalFiles:
    """Text of the user's own."""

    path: str = key("file or folder: .txt, .md, or JSON lines with a text field")
    domain: str = key("which domain it counts to: " + ", ".join(TEXT_DOMAINS), "prose")
    licence: str = key("its licence, printed and kept in the manifest", "not stated")
    name: str = key("its name in manifest and messages; default: from the path", "")
    field: str = key("field that holds the text in JSON lines", "text")
    max_bytes: int | None = key("most text taken of it, chosen by hash", None, unit="bytes")


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """A Hugging Face dataset (needs a network and the `datasets` extra)."""

    name: str = key("hub id, e.g. HuggingFaceFW/fineweb-edu")
    config: str | None = key("one of its configurations, where it has several", None)
    split: str = key("split to read", "train")
    field: str = key("column that holds the text", "text")
    domain: str = key("which domain it counts to: " + ", ".join(TEXT_DOMAINS), "prose")
    licence: str = key("its licence, printed and kept in the manifest", "see the dataset's page")
    max_bytes: int | None = key("the stream is read this far; default: the max_bytes of its domain", None, unit="bytes")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where text comes from and how much of it is kept."""

    preset: Literal["none", "small", "base", "full"] = key("packaged corpora: small 172 MB, base 1.1 GB, full 2.4 GB", "small")
    files: tuple[LocalFiles, ...] = key("your own text", ())
    huggingface: tuple[HubDataset, ...] = key("Hugging Face datasets", ())
    validation_share: float = key("share of documents held out, chosen by hash", 0.01, unit="share")
    max_bytes: dict[str, int] = key("most text kept of a domain or source, e.g. {prose: 12MB, sotu: 1MB}", {}, unit="bytes")


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
    warmup_steps: int = key("steps of linear warm-up; a stage with start: continue has none", 2000, unit="steps")
    weight_decay: float = key("on matrices only", 0.1, low=0.0)
    beta1: float = key("AdamW beta 1", 0.9, low=0.0, high=MOST_BETA)
    beta2: float = key("AdamW beta 2", 0.95, low=0.0, high=MOST_BETA)
    clip_norm: float = key("gradient norm is clipped here", 1.0, low=0.0)


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Next-token training on a mixture; mid-training is the same with other data and `start: continue`."""

    name: str = key("folder of the stage in the run")
    kind: Literal["pretrain"] = key("pretrain")
    tokens: int = key("tokens to train on", unit="tokens", low=1)
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
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True, kw_only=True)
class Top:
    """Keys of the file itself; `model` and `stages` are read by functions of their own."""

    name: str = key("name of the run: its folder is runs/NAME")
    model: dict[str, Any] = key(f"`preset` ({', '.join(PRESETS)}), and any field of the public config.json to change it")
    data: Data = key("text to tokens")
    stages: tuple[Any, ...] = key("list of stages, in order; each has a name and a kind: " + ", ".join(KINDS))
    seed: int = key("every random choice follows from it", 0, low=0)
    threads: int = key("CPU threads; weights trained on a CPU are bit-exact for a fixed number", os.cpu_count() or 1, low=1)
    precision: Literal["auto", "bf16", "fp32"] = key(
        "activations in training; weights and optimiser are fp32 always. auto: bf16 where the CPU multiplies it faster, "
        "and on a GPU", "auto")
    device: Literal["cpu", "cuda"] = key("where to train; on a CUDA device a resumed run may differ in its last bits", "cpu")


def document_keys() -> str:
    """Every key of a recipe with its meaning, unit and default."""
    lines = list(describe(Top))
    for kind, cls in KINDS.items():
        lines += ["", f"stages, kind: {kind} - {cls.__doc__}", *describe(cls, 1)]
    return "\n".join(lines)
