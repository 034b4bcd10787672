"""Rotary position embedding on part of each head, and its YaRN extension."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import UserError


@dataclass(frozen=True)
class Rotary:
    """Cosine and sine of the rotation angles, [batch, seq, rotary_dim], in the model's dtype."""

    cos: Tensor
    sin: Tensor


def rotary_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """Angles `position * theta^(-2i / rotary_dim)` in fp32, written twice (rotate-half layout), cast to `dtype`.

    positions [batch, seq]. YaRN multiplies cosine and sine by its temperature (YaRN §3.4), so only the rotated part is scaled.
    """
    frequencies, scale = frequencies_of(config)
    angles = positions[..., None].float() * frequencies.to(positions.device)         # [batch, seq, rotary_dim / 2]
    angles = torch.cat([angles, angles], dim=-1)
    return Rotary((angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype))


def frequencies_of(config: ModelConfig) -> tuple[Tensor, float]:
    """The rotary_dim / 2 frequencies, and the factor on cosine and sine (1 without YaRN)."""
    dim = config.rotary_dim
    plain = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if config.rope_scaling is None:
        return plain, 1.0
    kind = config.rope_scaling.get("rope_type", config.rope_scaling.get("type"))
    if kind != "yarn":
        raise UserError(f"rope_scaling: type '{kind}' is not supported; use 'yarn' or leave rope_scaling out")
    return yarn_frequencies(config, plain, config.rope_scaling)


def yarn_frequencies(config: ModelConfig, plain: Tensor, scaling: dict[str, Any]) -> tuple[Tensor, float]:
    """YaRN §3.2: slow frequencies are divided by the factor, fast ones kept, a linear ramp over the index between.

    The bounds are the indices that turn `beta_fast` and `beta_slow` times over the original context, rounded outwards.
    """
    factor = float(scaling["factor"])
    original = scaling.get("original_max_position_embeddings") or config.max_position_embeddings
    dim = config.rotary_dim

    def index_of_turns(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = index_of_turns(scaling.get("beta_fast") or 32)
    high = index_of_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if high == low else high
    slow_share = ((torch.arange(dim // 2).float() - low) / (high - low)).clamp(0, 1)
    return plain / factor * slow_share + plain * (1 - slow_share), yarn_temperature(factor, scaling)


def yarn_temperature(factor: float, scaling: dict[str, Any]) -> float:
    """sqrt(1/t) of YaRN §3.4: 0.1 ln(factor) + 1 unless the config says otherwise."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])
    return scale(1.0)
