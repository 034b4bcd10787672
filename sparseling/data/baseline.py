"""Bits per byte of models that are no neural network, on the same validation text: what a trained model has to beat.

All of them code the documents whole: every byte, and the end of each document as one more symbol (byte 0xFF, which UTF-8 never uses).
The cost of the ends counts, their bytes do not, as for a model that predicts `<|endoftext|>`. A text that is cut before its document's end
(`ended` False) is charged for no end.
"""

from __future__ import annotations

import functools
import itertools
import lzma
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..progress import bar

_END = 0xFF
_BYTES_PER_CHUNK = 4_000_000


@dataclass(frozen=True, eq=False)
class Order2Model:
    """Interpolated modified Kneser-Ney over bytes with the two bytes before as context (Chen and Goodman 1999, section 3).

    Of Witten-Bell, modified absolute discounting and this, this one gave the fewest bits on text of 0.05 to 25 MB.
    `counts` are tables [..., 256] of order 2, 1 and 0: how often a byte followed a context; in the lower orders, in how many
    different longer contexts it did. `discounts`: what is taken off a count of 1, 2, and 3 or more, for each order.
    """

    counts: tuple[np.ndarray, np.ndarray, np.ndarray]
    discounts: tuple[np.ndarray, np.ndarray, np.ndarray]

    def probabilities(self, before: bytes) -> np.ndarray:
        """[256] float64: the probability of each next byte after the two bytes `before`; 0xFF stands for the end of a document."""
        assert len(before) == 2
        symbols = np.arange(256)
        return self._probability(np.full(256, before[0] << 8 | before[1]), symbols)

    def bits(self, texts: Iterable[str], ended: Iterable[bool] | None = None) -> tuple[float, int]:
        """The cost of `texts` in bits, the ends of those that are `ended` (default: all) included, and their UTF-8 bytes."""
        bits, text_bytes = 0.0, 0
        flags = iter(ended) if ended is not None else itertools.repeat(True)
        for chunk, size in _chunks(texts):
            contexts, symbols = _contexts(chunk)
            cost = -np.log2(self._probability(contexts, symbols))
            ends = np.flatnonzero(symbols == _END)
            cost[ends] *= np.fromiter(itertools.islice(flags, len(ends)), dtype=bool, count=len(ends))
            bits += float(cost.sum())
            text_bytes += size
        return bits, text_bytes

    def _probability(self, contexts: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """float64 of the shape of `symbols`: their probability after the contexts (first byte * 256 + second)."""
        probability: np.ndarray = np.full(symbols.shape, 1 / 256)
        places = (contexts, contexts & 0xFF, np.zeros_like(contexts))
        for place, table, discounts, (seen, freed) in reversed(list(zip(places, self.counts, self.discounts, self._sums, strict=True))):
            count = table[place, symbols]
            kept = (count - discounts[np.minimum(count, 3)] + freed[place] * probability) / np.maximum(seen[place], 1)
            probability = np.where(seen[place] > 0, kept, probability)
        return probability

    @functools.cached_property
    def _sums(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each order: the sum of counts of each context, and how much of it the discounts free for the order below."""
        return [(table.sum(-1), _freed(table, discounts)) for table, discounts in zip(self.counts, self.discounts, strict=True)]


def train_order2(texts: Iterable[str]) -> Order2Model:
    """Count `texts` once. Raises `UserError` when there is no text at all."""
    flat = np.zeros(2**24, dtype=np.int32)
    with bar("counting bytes (MB)", None) as line:
        for chunk, size in _chunks(texts):
            contexts, symbols = _contexts(chunk)
            flat += np.bincount(contexts << 8 | symbols, minlength=2**24).astype(np.int32)
            line.advance(size / 1e6)
    if not flat.any():
        raise UserError("baseline: no training text to count; give at least one document")
    order2 = flat.reshape(256, 256, 256)
    order1 = (order2 > 0).sum(0, dtype=np.int32)
    order0 = (order1 > 0).sum(0, dtype=np.int32)
    tables = (order2.reshape(2**16, 256), order1, order0[None])
    return Order2Model(tables, tuple(_discounts(table) for table in tables))  # type: ignore[arg-type]


def compressed_bits_per_byte(texts: Sequence[str], ended: Sequence[bool] | None = None) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9e` on the documents in one stream; they learn from that stream alone."""
    compressors: dict[str, Any] = {"gzip": zlib.compressobj(9, wbits=31), "lzma": lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)}
    sizes = dict.fromkeys(compressors, 0)
    text_bytes = sum(len(_utf8(text)) for text in texts)
    with bar("compressing validation text (MB)", text_bytes / 1e6) as line:
        for text, whole in zip(texts, ended or itertools.repeat(True), strict=False):
            document = _utf8(text)
            for name, compressor in compressors.items():
                sizes[name] += len(compressor.compress(document + bytes([_END] * whole)))
            line.advance(len(document) / 1e6)
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.flush())
    return {name: _per_byte(size * 8, text_bytes) for name, size in sizes.items()}


def baseline_bits_per_byte(
    training: Iterable[str], validation: Sequence[str], ended: Sequence[bool] | None = None
) -> dict[str, float]:
    """Bits per byte on `validation` of the order-2 byte model counted on `training` (`order2`), and of `gzip` and `lzma`.

    `ended`: which of the validation texts go to the end of their document (default: all).
    """
    return {"order2": _per_byte(*train_order2(training).bits(validation, ended)), **compressed_bits_per_byte(validation, ended)}


def _per_byte(bits: float, text_bytes: int) -> float:
    if text_bytes == 0:
        raise UserError("baseline: the validation text is empty; give at least one document")
    return bits / text_bytes


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")  # a lone surrogate becomes a question mark


def _chunks(texts: Iterable[str]) -> Iterator[tuple[np.ndarray, int]]:
    """Whole documents, some megabytes at once, each ended by 0xFF, with 0xFF 0xFF in front; and their bytes of text."""
    pieces, size = [], 0
    for text in texts:
        pieces.append(_utf8(text))
        size += len(pieces[-1])
        if size >= _BYTES_PER_CHUNK:
            yield _stream(pieces), size
            pieces, size = [], 0
    if pieces:
        yield _stream(pieces), size


def _stream(documents: list[bytes]) -> np.ndarray:
    end = bytes([_END])
    return np.frombuffer(end + end + end.join(documents) + end, dtype=np.uint8)


def _contexts(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each byte after the first two: its context (first byte * 256 + second) and itself, int64. A document starts at 0xFFFF."""
    first, second, symbols = (stream[n : len(stream) - 2 + n].astype(np.int64) for n in range(3))
    first[second == _END] = _END  # the last byte of the document before says nothing
    return first << 8 | second, symbols


def _freed(table: np.ndarray, discounts: np.ndarray) -> np.ndarray:
    return sum((discounts[n] * (table == n if n < 3 else table >= 3).sum(-1) for n in (1, 2, 3)), np.zeros(len(table)))


def _discounts(table: np.ndarray) -> np.ndarray:
    """[4] what is taken off counts of 0, 1, 2, and more, from how many entries have count 1 to 4 (Chen and Goodman 1999, eq. 17)."""
    ones, twos, threes, fours = (int((table == count).sum()) for count in (1, 2, 3, 4))
    if min(ones, twos, threes) == 0:
        return np.array([0.0, 0.5, 1.0, 1.5])  # too little text to estimate
    ratio = ones / (ones + 2 * twos)
    raw = [1 - 2 * ratio * twos / ones, 2 - 3 * ratio * threes / twos, 3 - 4 * ratio * fours / threes]
    return np.array([0.0, *(min(max(discount, 0.05), count) for count, discount in enumerate(raw, start=1))])
