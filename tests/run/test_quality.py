"""Perplexity and divergence against plain PyTorch numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sparseling.config import ModelConfig
from sparseling.data.tokenizer import Tokenizer
from sparseling.errors import UserError
from sparseling.run.engine import why_not
from sparseling.run.load import load
from sparseling.run.open import open_engine
from sparseling.run.quality import compare, texts_of, windows_of


def test_figures_are_those_of_the_definitions(model_folder: Path) -> None:
    if why_not(ModelConfig.from_folder(model_folder)) is not None:
        return
    model, tokenizer = load(model_folder, device="cpu")
    texts = ["How many? Größe " * 10, "SYSTEM HUMAN\n" * 30]
    quality = compare(open_engine(model_folder, "fp32", threads=1), open_engine(model_folder, "int4", threads=1), texts, tokenizer)
    nats = count = size = 0.0
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.end_of_text_id]
        for start in range(0, len(ids), 256):                        # the model's context
            window = torch.tensor(ids[start:start + 256])
            with torch.no_grad():
                log = model.logits(model(window[None, :-1]).hidden_states)[0].double().log_softmax(-1)
            nats -= float(log.gather(1, window[1:, None]).sum())
            count += len(window) - 1
            size += sum(len(tokenizer.bytes_of(token)) for token in window[1:].tolist())
    assert (quality.tokens, quality.text_bytes) == (count, size)
    assert quality.reference_perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert quality.reference_bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert quality.divergence > 1e-5 and 0.5 < quality.same_choice < 1 and quality.perplexity_ratio != 1
    same = compare(*(open_engine(model_folder, "int8", threads=1) for _ in range(2)), texts[:1], tokenizer)
    assert same.divergence == 0 and same.same_choice == 1 and same.perplexity_ratio == 1


def test_texts_and_windows(model_folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_folder)
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "a.jsonl").write_text('{"id": "x", "text": "one"}\n{"id": "y", "text": "two"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert texts_of(tmp_path / "a.txt") == ["one\ntwo"] and texts_of(tmp_path / "a.jsonl") == ["one", "two"]
    for name, message in (("none.txt", "no such file"), ("latin.txt", "not UTF-8")):
        with pytest.raises(UserError, match=message):
            texts_of(tmp_path / name)
    windows = windows_of(["abc " * 100, "", "x"], tokenizer, 7)
    assert all(2 <= len(window) <= 7 for window in windows)
    many = windows_of([" ".join(map(str, range(60_000)))], tokenizer, 64)
    firsts = [int(tokenizer.decode(window).split()[1]) for window in many]
    assert len(many) == 2048 and firsts == sorted(firsts) and firsts[0] == 1 and firsts[-1] > 59_900, "spread over all of it"
    with pytest.raises(UserError, match="no two tokens in a row"):
        compare(*2 * [Empty()], [], tokenizer)  # type: ignore[list-item]


class Empty:
    max_positions, pages = 64, 4
