"""A whole tiny model folder: a tokenizer trained on a few sentences and random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseling.checkpoint.hf import save_model
from sparseling.config import preset
from sparseling.data.tokenizer import train_tokenizer
from sparseling.model.transformer import LingForCausalLM

SHAPES = {
    "pytorch": preset("pico"),  # its heads are too narrow for the native engine
    "engine": preset("pico").replace(hidden_size=64, num_attention_heads=2, head_dim=32, moe_intermediate_size=32, num_key_value_heads=1),
}


@pytest.fixture(scope="session", params=list(SHAPES))
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    texts = ["detailed thinking on and off, SYSTEM HUMAN ASSISTANT\nHow many? Größe 数 ünï"] * 20
    tokenizer = train_tokenizer(texts, 320, folder / "tokenizer")
    config = SHAPES[request.param].replace(vocab_size=400, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    model = LingForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_model(model, config, folder / "model", tokenizer_folder=folder / "tokenizer")
    return folder / "model"
