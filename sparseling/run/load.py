"""A model in PyTorch and its tokenizer, ready to answer. (On the native engine: open.py.)"""

from __future__ import annotations

from pathlib import Path

import torch

from ..accounting import count_parameters
from ..checkpoint.hf import load_model
from ..checkpoint.hub import resolve
from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..model.transformer import LingForCausalLM
from .packed_folder import is_packed

FLOAT32_PARAMETERS = 1_000_000_000  # on a CPU, models up to this size run in float32: several times faster there than bfloat16


def load(model: str | Path, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[LingForCausalLM, Tokenizer]:
    """The model (without MTP layers, which an answer does not need) and the tokenizer of a folder or hub id.

    `device`: None takes a CUDA device if there is one. `dtype`: None is as stored, or float32 for small models on a CPU.
    Raises `UserError` for a model that cannot be read, or a tokenizer that is not the model's.
    """
    folder = resolve(model)
    tokenizer, config = tokenizer_and_config(folder)
    if is_packed(folder):
        raise UserError(f"{folder}: is packed for the native engine and cannot be run on PyTorch operations; give the model it came from")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None and device == "cpu" and count_parameters(config).total <= FLOAT32_PARAMETERS:
        dtype = torch.float32
    return load_model(folder, dtype, mtp=False).to(device).eval(), tokenizer


def tokenizer_and_config(folder: Path) -> tuple[Tokenizer, ModelConfig]:
    """Those of a local folder. Raises `UserError` for a tokenizer that is not the model's."""
    tokenizer, config = Tokenizer.load(folder), ModelConfig.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
                        "put the model's own tokenizer there")
    return tokenizer, config


def stop_ids_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the end of a chat turn and the end of a document."""
    return tuple(sorted({tokenizer.eos_id, tokenizer.end_of_text_id}))
