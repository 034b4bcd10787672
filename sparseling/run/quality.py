"""What narrow weights cost: perplexity and divergence of one engine beside another, on a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.document_files import read_documents
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..progress import track
from .engine import PAGE, Engine

WINDOW_TOKENS = 512
MOST_TOKENS = 131_072  # of a longer text, windows spread evenly over it
ROWS = 64              # whose distributions are compared at once, in float64


@dataclass(frozen=True)
class Quality:
    """On `tokens` predicted tokens with `text_bytes` bytes: bits per byte and perplexity per token of both, the mean divergence
    KL(reference || candidate) in nats a token, and the share of tokens whose likeliest next token is the same."""

    tokens: int
    text_bytes: int
    reference_bits_per_byte: float
    bits_per_byte: float
    reference_perplexity: float
    perplexity: float
    divergence: float
    same_choice: float

    @property
    def perplexity_ratio(self) -> float:
        """Candidate's over reference's: 1.01 is 1% worse."""
        return self.perplexity / self.reference_perplexity


def texts_of(path: str | Path) -> list[str]:
    """A text file is one text; `.jsonl` has `{"id", "text"}` lines, as a run's `data/documents/validation`."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return [text for _, text in read_documents(path)]
    try:
        return [path.read_text(encoding="utf-8")]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); convert it first") from None


def windows_of(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Every text as an id list with its end mark, cut into windows of `length` and spread evenly down to `MOST_TOKENS`; a window of one
    token predicts nothing and is left out."""
    windows = []
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.end_of_text_id]
        windows += [ids[start:start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    most = max(1, MOST_TOKENS // length)
    return [windows[n * len(windows) // most] for n in range(most)] if len(windows) > most else windows


def compare(reference: Engine, candidate: Engine, texts: Sequence[str], tokenizer: Tokenizer) -> Quality:
    """Both engines over `texts`, window by window, each window from nothing. Raises `UserError` for texts with nothing to predict."""
    length = min(WINDOW_TOKENS, *(min(engine.max_positions, engine.pages * PAGE) for engine in (reference, candidate)))
    windows = windows_of(texts, tokenizer, length)
    if not windows:
        raise UserError("quality: the text has no two tokens in a row; give a longer one")
    sums = torch.zeros(4, dtype=torch.float64)
    text_bytes = 0
    for window in track(windows, "quality"):
        text_bytes += int(tokenizer.text_bytes_per_id[window[1:]].sum())
        for rows in rows_of(len(window) - 1):
            sums += compared(reference, candidate, window, rows)
    tokens = sum(len(window) - 1 for window in windows)
    ours, theirs, divergence, same = (sums / tokens).tolist()
    bits = tokens / math.log(2) / max(1, text_bytes)
    return Quality(tokens, text_bytes, ours * bits, theirs * bits, math.exp(ours), math.exp(theirs), divergence, same)


def rows_of(count: int) -> Iterator[range]:
    for start in range(0, count, ROWS):
        yield range(start, min(start + ROWS, count))


def compared(reference: Engine, candidate: Engine, window: list[int], rows: range) -> Tensor:
    """Sums over `rows` of a window: nats of both engines, divergence, equal choices [4]. The rows before have been computed."""
    ours, theirs = (log_probabilities(engine, window, rows) for engine in (reference, candidate))
    labels = torch.tensor(window[rows.start + 1:rows.stop + 1])[:, None]
    divergence = (ours.exp() * (ours - theirs)).sum()
    same = (ours.argmax(-1) == theirs.argmax(-1)).sum()
    return torch.stack([-ours.gather(1, labels).sum(), -theirs.gather(1, labels).sum(), divergence, same.double()])


def log_probabilities(engine: Engine, window: list[int], rows: range) -> Tensor:
    """[rows, vocab] in float64."""
    n, pages = len(rows), -(-rows.stop // PAGE)
    out = engine.step(torch.tensor(window[rows.start:rows.stop]), torch.arange(rows.start, rows.stop), torch.zeros(n, dtype=torch.int64),
                      torch.arange(pages, dtype=torch.int32)[None], torch.arange(n))
    return out.logits.double().log_softmax(-1)
