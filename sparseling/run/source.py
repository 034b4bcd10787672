"""Where an engine's parts come from: a model in memory or a public folder, packed as they are asked for (packed folders: packed_folder.py).

    source = source_of_model(model, "int8")
    source = source_of_checkpoint(open_checkpoint(folder), "int4")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoint.hf import WeightFolder, read_checkpoint, with_progress
from ..checkpoint.names import public_views
from ..config import ModelConfig
from ..model.transformer import LingForCausalLM
from .packed import Kind
from .parts import Part, PartPlan, make_part, plan_parts


@dataclass(frozen=True, eq=False)
class Source:
    """A model's parts, in the order of `plan_parts`, one at a time; to be gone through once. Weights are of `kind`, MTP layers come if the
    config has them."""

    config: ModelConfig
    kind: Kind
    parts: Iterable[tuple[str, Part]]


def source_of_model(model: LingForCausalLM, kind: Kind) -> Source:
    """A model in memory, with the MTP layers that it has."""
    config, plans = model.config, plan_parts(model.config, kind)
    tensors = dict(public_views(model.state_dict()))
    return Source(config, kind, parts_of(plans, (tensors[name] for plan in plans for name in plan.tensors)))


def source_of_checkpoint(checkpoint: WeightFolder, kind: Kind) -> Source:
    """A public folder; of its tensors one is in memory at a time, and the part that is being packed. Layers that are not to be read are
    taken out before (`without_mtp`)."""
    plans = plan_parts(checkpoint.config, kind)
    fp8_to = torch.float32 if checkpoint.dtype == torch.float32 else torch.bfloat16
    stored = (tensor for _, tensor in read_checkpoint(checkpoint, [name for plan in plans for name in plan.tensors], fp8_to))
    return Source(checkpoint.config, kind, parts_of(plans, iter(with_progress(stored, "packing weights", checkpoint))))


def parts_of(plans: Iterable[PartPlan], tensors: Iterator[Tensor]) -> Iterator[tuple[str, Part]]:
    """(name, part) for every plan, in order."""
    for plan in plans:
        yield plan.name, make_part(plan, tensors)
