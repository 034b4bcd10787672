"""From a folder or hub id to an engine, without building the model in PyTorch.

    engine = open_engine("ling-mini-int4")                     # a packed folder: mapped
    engine = open_engine("inclusionAI/Ling-mini-2.0", "int4")  # a public one: packed tensor by tensor
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..accounting import count_parameters
from ..checkpoint.hf import WeightFolder, open_checkpoint, without_mtp
from ..checkpoint.hub import resolve
from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.transformer import LingForCausalLM
from ..progress import say
from .context import with_context
from .engine import PAGE, Engine, why_not
from .load import FLOAT32_PARAMETERS, load, tokenizer_and_config
from .packed import Kind
from .packed_folder import is_packed, open_packed, source_of_packed
from .scheduler import Scheduler
from .source import Source, source_of_checkpoint
from .speculate import DRAFTS, speculator_for


@dataclass(frozen=True)
class Ready:
    """A model that can answer: on the native engine by `scheduler`, or where that cannot run it, as `model` in PyTorch."""

    config: ModelConfig
    tokenizer: Tokenizer
    scheduler: Scheduler | None
    model: LingForCausalLM | None


def ready(model: str | Path, kind: Kind | None = None, threads: int | None = None, context: int | None = None,
          drafts: int = DRAFTS) -> Ready:
    """The native engine, with room for one full context, where it can run the model; else, or where there is a CUDA device and no kind is
    asked for, PyTorch. `context` in tokens, if not the model's own; `drafts`: how many tokens an MTP layer may guess at once, 0 for none.

    Raises `UserError` for a kind or a packed folder that the engine cannot run, and as `load` and `open_engine` do.
    """
    folder = resolve(model)
    tokenizer, config = tokenizer_and_config(folder)
    native_only = kind is not None or context is not None or is_packed(folder)
    reason = why_not(config)
    if reason is None and (native_only or not torch.cuda.is_available()):
        engine = open_engine(folder, kind, threads=threads, context=context, mtp=drafts > 0)
        return Ready(engine.config, tokenizer, Scheduler(engine, speculator=speculator_for(engine, drafts)), None)
    if native_only:
        raise UserError(f"{folder}: the native engine cannot run this model: {reason}; give a public folder, and no kind of weights "
                        "or context")
    loaded, tokenizer = load(folder)
    return Ready(loaded.config, tokenizer, None, loaded)


def open_engine(model: str | Path, kind: Kind | None = None, pages: int | None = None, threads: int | None = None,
                context: int | None = None, mtp: bool = True, preload: bool = False) -> Engine:
    """`kind`: None is that of a packed folder; of a public one as stored, or fp32 for a small model. `context`: other than the config's, by
    YaRN where it is longer, which the user is told. `pages`: None has room for one full context. `mtp`: with the MTP layer, if there is
    one. `preload`: a packed folder is read whole at the start instead of mapped, for disks that are too slow or do not map large pages.

    Raises `UserError` as `source_of_folder` and `Engine` do, `UsageError` as `with_context` does.
    """
    source, warning = source_for(model, kind, context, mtp, preload)
    if warning:
        say(warning)
    return Engine(source, pages or -(-source.config.max_position_embeddings // PAGE) + 1, threads)


def source_for(model: str | Path, kind: Kind | None = None, context: int | None = None, mtp: bool = True, preload: bool = False,
               ) -> tuple[Source, str]:
    """The parts for `open_engine`, and what the user is to be told of the context."""
    source = source_of_folder(resolve(model), kind, preload, mtp)
    config, warning = with_context(source.config, context)
    return replace(source, config=config), warning


def source_of_folder(folder: Path, kind: Kind | None = None, preload: bool = False, mtp: bool = True) -> Source:
    """The parts of a local folder, packed or public. Raises `UserError` for a packed folder of another kind, and as `open_packed` and
    `open_checkpoint` do."""
    if is_packed(folder):
        packed = open_packed(folder)
        if kind not in (None, packed.kind):
            raise UserError(f"{folder}: its weights are packed in {packed.kind}, not {kind}; convert the model it came from to {kind}")
        source = source_of_packed(packed, preload)
        return source if mtp else replace(source, config=source.config.replace(num_nextn_predict_layers=0))
    checkpoint = open_checkpoint(folder)
    checkpoint = checkpoint if mtp else without_mtp(checkpoint)
    return source_of_checkpoint(checkpoint, kind or default_kind(checkpoint))


def default_kind(checkpoint: WeightFolder) -> Kind:
    """As exact as what is stored; fp32 for small models, where it costs little."""
    small = count_parameters(checkpoint.config).total <= FLOAT32_PARAMETERS
    return "fp32" if small or checkpoint.dtype == torch.float32 else "bf16"
