"""Batches: windows of the token stream for pre-training and validation, packed rows of whole examples for fine-tuning."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .mixture import Mixture, shuffled
from .shards import Shards

NOT_TRAINED = -100  # the label that every loss ignores


@dataclass(frozen=True)
class Batch:
    """What one training step reads; all int64 [batch, seq].

    `labels[b, t]` is the token after `input_ids[b, t]`, -100 where nothing is to be learned: after the end of a document, and
    where fine-tuning masks. `document_ids` are constant within a document and grow along the row; attention stays within one.
    """

    input_ids: Tensor
    labels: Tensor
    document_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """On that device."""
        return Batch(self.input_ids.to(device), self.labels.to(device), self.document_ids.to(device))


@dataclass(frozen=True)
class Row:
    """One row of a batch: three int64 arrays [seq], as in `Batch`."""

    input_ids: np.ndarray
    labels: np.ndarray
    document_ids: np.ndarray


def windows_of(shards: Shards, seq_length: int) -> int:
    """How many training windows a domain has: `seq_length` inputs each, and one more token for the last label."""
    return max(0, (shards.tokens - 1) // seq_length)


def pretraining_batch(mixture: Mixture, shards: Mapping[str, Shards], first_index: int, batch_sequences: int, seq_length: int) -> Batch:
    """Samples `first_index` to `first_index + batch_sequences` of the mixture: a pure function of its arguments.

    `shards`: the training shards of each domain; the mixture must be built with `windows_of(shards[domain], seq_length)`.
    """
    rows = []
    for index in range(first_index, first_index + batch_sequences):
        domain, window = mixture.sample(index)
        rows.append(_window(shards[domain], window * seq_length, seq_length))
    return rows_batch(rows)


def rows_batch(rows: Sequence[Row]) -> Batch:
    """Stack rows of one length to a batch."""
    stacked = (np.stack([getattr(row, name) for row in rows]) for name in ("input_ids", "labels", "document_ids"))
    return Batch(*(torch.from_numpy(array) for array in stacked))


def _window(shards: Shards, start: int, seq_length: int) -> Row:
    """Inputs `start` to `start + seq_length` of the stream. The first token of a document is no label: nothing before it is its own."""
    tokens = shards.read(start, seq_length + 1)
    documents = shards.document_of(np.arange(start, start + seq_length + 1))
    labels = np.where(documents[1:] == documents[:-1], tokens[1:], NOT_TRAINED)
    return Row(tokens[:-1], labels, documents[:-1] - documents[0])


# Validation


@dataclass(frozen=True)
class Coverage:
    """What validation over a domain reads, for exact bits per byte.

    Each window is coded by itself. Every token of it is a label once, but for its first token and the first token of each document in
    it, which have nothing of their own before them. `text_bytes` are the UTF-8 bytes (in NFC) of the labels, `first_token_bytes` those of
    the others; an `<|endoftext|>` is a label without bytes.
    """

    windows: int
    labels: int
    text_bytes: int
    first_tokens: int
    first_token_bytes: int

    def with_first_tokens(self, bits_per_byte: float, vocab_size: int) -> float:
        """Bits per byte of a complete code of the text: each first token costs log2(vocab_size) bits and its bytes count.

        An upper bound that nothing is left out of, for the comparison with compressors.
        """
        bits = bits_per_byte * self.text_bytes + self.first_tokens * math.log2(vocab_size)
        return bits / (self.text_bytes + self.first_token_bytes)


def validation_windows(shards: Shards, seq_length: int, most_windows: int | None = None) -> list[tuple[int, int]]:
    """(first, last) positions in the stream: all of it in windows of `seq_length`, or `most_windows` of them spread evenly over it.

    Spread, not the first ones: a domain's text stands in the order of its sources.
    """
    windows = -(-shards.tokens // seq_length)
    chosen = windows if most_windows is None else min(windows, most_windows)
    starts = (number * windows // chosen * seq_length for number in range(chosen))
    return [(start, min(start + seq_length, shards.tokens)) for start in starts]


def validation_batches(
    shards: Shards, batch_sequences: int, seq_length: int, pad_id: int, most_windows: int | None = None
) -> Iterator[Batch]:
    """The windows of `validation_windows` as rows, see `Coverage` for their labels. The last batch may have fewer rows."""
    windows = validation_windows(shards, seq_length, most_windows)
    for first in range(0, len(windows), batch_sequences):
        rows = [_alone(shards, start, end) for start, end in windows[first : first + batch_sequences]]
        yield rows_batch([_padded([row], seq_length, pad_id) for row in rows])


def _alone(shards: Shards, start: int, end: int) -> Row:
    """Tokens `start` to `end` as a row that is predicted from itself alone."""
    tokens, documents = shards.read(start, end - start), shards.document_of(np.arange(start, end))
    labels = np.full(len(tokens), NOT_TRAINED, dtype=np.int64)
    labels[:-1] = np.where(documents[1:] == documents[:-1], tokens[1:], NOT_TRAINED)
    return Row(tokens, labels, documents - documents[0])


def coverage(shards: Shards, text_bytes_per_id: np.ndarray, seq_length: int, most_windows: int | None = None) -> Coverage:
    """What `validation_batches` with the same arguments covers. `text_bytes_per_id` [vocab_size]: `Tokenizer.text_bytes_per_id`."""
    windows = validation_windows(shards, seq_length, most_windows)
    tokens = labels = all_bytes = label_bytes = 0
    for start, end in windows:
        row = _alone(shards, start, end)
        learned = row.labels[row.labels != NOT_TRAINED]
        tokens, labels = tokens + len(row.input_ids), labels + len(learned)
        all_bytes += int(text_bytes_per_id[row.input_ids].sum())
        label_bytes += int(text_bytes_per_id[learned].sum())
    return Coverage(len(windows), labels, label_bytes, tokens - labels, all_bytes - label_bytes)


def validation_pieces(shards: Shards, seq_length: int, most_windows: int | None = None) -> Iterator[np.ndarray]:
    """The tokens of the same windows, cut where documents begin: what a compressor is given to compare with."""
    for start, end in validation_windows(shards, seq_length, most_windows):
        documents = shards.document_of(np.arange(start, end))
        yield from np.split(shards.read(start, end - start), np.flatnonzero(documents[1:] != documents[:-1]) + 1)


# Fine-tuning


@dataclass(frozen=True)
class Packed:
    """Rows of packed examples, how many examples were `skipped` (too long or empty), and the share of all slots that hold tokens."""

    rows: list[Row]
    skipped: int
    filled: float


def pack(examples: Sequence[tuple[Sequence[int], Sequence[int | bool]]], seq_length: int, pad_id: int) -> Packed:
    """Put whole examples (token ids, loss mask: is this token to be learned) into as few rows as best-fit-decreasing finds.

    An example is a document of its own in its row; none is split. Longer than `seq_length`, or empty: skipped and counted. Rows are filled
    up with `pad_id`, label -100, as one more document. Best fit needs at most 11/9 of the fewest possible rows, plus some constant
    (Johnson et al. 1974). Deterministic. Raises `UserError` when no example fits.
    """
    by_length = sorted((n for n in range(len(examples)) if 0 < len(examples[n][0]) <= seq_length), key=lambda n: (-len(examples[n][0]), n))
    if not by_length:
        raise UserError(f"seq_length: none of {len(examples)} examples fits into {seq_length} tokens; raise it or shorten the examples")
    contents: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (slots left, row), sorted
    for number in by_length:
        length = len(examples[number][0])
        place = bisect.bisect_left(free, (length, -1))
        left, row = free.pop(place) if place < len(free) else (seq_length, len(contents))
        if row == len(contents):
            contents.append([])
        contents[row].append(number)
        if left > length:
            bisect.insort(free, (left - length, row))
    rows = [_padded([_example_row(*examples[number]) for number in numbers], seq_length, pad_id) for numbers in contents]
    filled = sum(len(examples[number][0]) for number in by_length) / (len(rows) * seq_length)
    return Packed(rows, len(examples) - len(by_length), filled)


def packed_batch(rows: Sequence[Row], seed: int, first_index: int, batch_sequences: int) -> Batch:
    """Samples `first_index` to `first_index + batch_sequences` of an endless walk over packed rows, each epoch shuffled anew.

    A pure function of its arguments, as in `mixture`.
    """
    numbers = [shuffled(index, len(rows), seed, "packed rows") for index in range(first_index, first_index + batch_sequences)]
    return rows_batch([rows[number] for number in numbers])


def _example_row(ids: Sequence[int], loss_mask: Sequence[int | bool]) -> Row:
    """One example as a row of its own length: position t learns token t + 1 if that is to be learned."""
    assert len(ids) == len(loss_mask)
    tokens = np.array(ids, dtype=np.int64)
    labels = np.full(len(ids), NOT_TRAINED, dtype=np.int64)
    labels[:-1] = np.where(np.array(loss_mask, dtype=bool)[1:], tokens[1:], NOT_TRAINED)
    return Row(tokens, labels, np.zeros(len(ids), dtype=np.int64))


def _padded(parts: Sequence[Row], seq_length: int, pad_id: int) -> Row:
    """Join rows to one of `seq_length`, each with documents of its own; what is left is padding, a document of its own too."""
    missing = seq_length - sum(len(part.input_ids) for part in parts)
    if missing:
        parts = [*parts, Row(np.full(missing, pad_id), np.full(missing, NOT_TRAINED), np.zeros(missing, dtype=np.int64))]
    documents, next_document = [], 0
    for part in parts:
        documents.append(part.document_ids + next_document)
        next_document = int(documents[-1][-1]) + 1
    ids, labels = np.concatenate([part.input_ids for part in parts]), np.concatenate([part.labels for part in parts])
    return Row(ids, labels, np.concatenate(documents))
