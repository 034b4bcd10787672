"""GGUF's Q8_0 and Q4_0: blocks of 32 elements with one f16 scale. Bit for bit what the package gguf makes, on all threads."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
ROWS_BYTES = 2**24  # of f32 in one go: intermediates stay small beside the matrix


def quantize(matrix: Tensor, kind: str) -> Tensor:
    """The blocks of a matrix whose rows are multiples of 32, uint8 [blocks, 34] for "Q8_0", [blocks, 18] for "Q4_0"."""
    code = {"Q8_0": q8_0, "Q4_0": q4_0}[kind]
    blocks = matrix.reshape(-1, BLOCK)
    return torch.cat([code(part.float()) for part in blocks.split(ROWS_BYTES // (4 * BLOCK))])


def q8_0(blocks: Tensor) -> Tensor:
    """Scale: largest magnitude / 127; codes int8, halves rounded away from zero."""
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * inverse(scale)
    magnitude = scaled.abs()
    whole = magnitude.floor()
    codes = scaled.sign() * (whole + (2 * (magnitude - whole)).floor())
    return torch.cat([scale_bytes(scale), codes.to(torch.int8).view(torch.uint8)], dim=1)


def q4_0(blocks: Tensor) -> Tensor:
    """Scale: the element of the largest magnitude / -8, so that it gets code 0; codes 0 to 15 stand for -8 to 7, element n and n + 16
    in a byte."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / -8
    codes = (blocks * inverse(scale) + 8.5).trunc().to(torch.uint8).clamp(0, 15)
    return torch.cat([scale_bytes(scale), codes[:, :16] | (codes[:, 16:] << 4)], dim=1)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 for a block of zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def scale_bytes(scale: Tensor) -> Tensor:
    return scale.half().view(torch.uint8)
