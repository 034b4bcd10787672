"""Weights stored as FP8 codes with one scale per 128x128 block, as in the published FP8 checkpoints (L2 §5.1).

On disk `x.weight` holds float8_e4m3fn codes [rows, columns] and `x.weight_scale_inv` float32 [ceil(rows/128), ceil(columns/128)];
the weight is codes * scale, block by block. The last block of a row or column may be ragged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

SCALE_SUFFIX = "_scale_inv"
BLOCK = (128, 128)
FP8_MAX = 448.0  # largest finite float8_e4m3fn
AMAX_FLOOR = 1e-4  # the published converter's floor: an all-zero block gets a usable scale


def spread(scales: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """One scale per element [rows, columns] from one per block."""
    return scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Shape of the scales that belong to a weight of `shape` [rows, columns]."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantize_blocks(
    codes: Tensor, scales: Tensor, block: tuple[int, int] = BLOCK, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Weight [rows, columns] in `dtype` from FP8 codes [rows, columns] and float32 scales per block.

    The product is taken in float32, so a float32 result carries one rounding and a bfloat16 one two.
    """
    assert scales.shape == scale_shape(tuple(codes.shape), block)
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    # One row of blocks at a time: no second float32 copy of a large weight.
    for first in range(0, codes.shape[0], block[0]):
        part = codes[first : first + block[0]].float()
        part.mul_(spread(scales[first // block[0]][None].float(), part.shape[0], part.shape[1], block))
        weight[first : first + block[0]] = part
    return weight


def quantize_blocks(weight: Tensor, block: tuple[int, int] = BLOCK, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn codes [rows, columns], float32 scales per block) of a weight [rows, columns].

    Scale = max(amax of the block, 1e-4) / 448, with `power_of_two` rounded up to a power of two (exactly, by exponent). The published
    FP8 checkpoints round up for attention.dense and the routed experts' gate_proj and up_proj only.
    """
    rows, columns = weight.shape
    height, width = scale_shape((rows, columns), block)
    padded = torch.zeros(height * block[0], width * block[1], dtype=torch.float32, device=weight.device)
    padded[:rows, :columns] = weight
    amax = padded.view(height, block[0], width, block[1]).abs().amax(dim=(1, 3))
    scales = amax.clamp_min(AMAX_FLOOR) / FP8_MAX
    if power_of_two:
        scales = round_up_to_power_of_two(scales)
    codes = (padded[:rows, :columns] / spread(scales, rows, columns, block)).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), scales


def round_up_to_power_of_two(values: Tensor) -> Tensor:
    """The smallest power of two >= each positive value. Through the exponent: exp2(ceil(log2)) errs near powers of two."""
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(values), exponent - (mantissa == 0.5).to(exponent.dtype))


def block_of(public: dict[str, Any], source: str) -> tuple[int, int]:
    """Block size from the `quantization_config` of a public config; 128x128 when it is not given.

    Raises `UserError` for other quantisation methods, which cannot be read.
    """
    quantization = public.get("quantization_config")
    if quantization is None:
        return BLOCK
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        raise UserError(f"{source}: quantization_config has quant_method {method!r}, only fp8 can be read; take the unquantised model")
    block = quantization.get("weight_block_size", list(BLOCK))
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)):
        raise UserError(f"{source}: weight_block_size is {block!r}, expected two positive numbers such as [128, 128]; mend the file")
    return block[0], block[1]
