"""Batches: labels and document ids against a slow definition, every token predicted once in validation, packing without loss."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseling.data.batches import (
    Batch,
    coverage,
    pack,
    packed_batch,
    pretraining_batch,
    rows_batch,
    validation_batches,
    validation_pieces,
    validation_windows,
    windows_of,
)
from sparseling.data.mixture import Mixture, build_mixture
from sparseling.data.shards import Shards, write_shards
from sparseling.data.tokenizer import Tokenizer
from sparseling.errors import UserError

from .small_corpus import corpus, small_tokenizer

SEQ = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, Shards]:
    folder = tmp_path_factory.mktemp("shards")
    texts = {"prose": corpus(1, 60), "worked": [f"{a} + {b} = {a + b}" for a in range(12) for b in range(12)]}
    return {
        name: write_shards([(str(n), text) for n, text in enumerate(documents)], tokenizer, folder / name, 2500)
        for name, documents in texts.items()
    }


@pytest.fixture(scope="module")
def mixture(domains: dict[str, Shards]) -> Mixture:
    groups = {"general": {"share": 0.6, "domains": {"prose": 1}}, "reasoning": {"share": 0.4, "domains": {"worked": 1}}}
    return build_mixture(groups, {name: windows_of(shards, SEQ) for name, shards in domains.items()}, seed=3)


def check_row(batch: Batch, row: int, stream: list[int], start: int, end_of_text: int) -> None:
    """The definition, token by token."""
    document = 0
    for t in range(SEQ):
        assert batch.input_ids[row, t] == stream[start + t]
        assert batch.document_ids[row, t] == document
        at_end = stream[start + t] == end_of_text
        assert batch.labels[row, t] == (-100 if at_end else stream[start + t + 1])
        document += at_end


def test_pretraining_batches_are_the_windows_of_the_mixture(domains: dict[str, Shards], mixture: Mixture, tokenizer: Tokenizer) -> None:
    streams = {name: shards.read(0, shards.tokens).tolist() for name, shards in domains.items()}
    batch = pretraining_batch(mixture, domains, first_index=5, batch_sequences=20, seq_length=SEQ)
    for tensor in (batch.input_ids, batch.labels, batch.document_ids):
        assert tensor.shape == (20, SEQ) and tensor.dtype == torch.int64
    for row in range(20):
        domain, window = mixture.sample(5 + row)
        check_row(batch, row, streams[domain], window * SEQ, tokenizer.end_of_text_id)
    ends = batch.labels == tokenizer.end_of_text_id
    assert ends.any()  # the end of a document is learned
    assert (batch.labels[batch.input_ids == tokenizer.end_of_text_id] == -100).all()  # what follows it is not


def test_batches_do_not_depend_on_how_indices_are_divided(domains: dict[str, Shards], mixture: Mixture) -> None:
    whole = pretraining_batch(mixture, domains, 7, 12, SEQ)
    parts = [pretraining_batch(mixture, domains, first, count, SEQ) for first, count in ((7, 1), (8, 4), (12, 7))]
    for name in ("input_ids", "labels", "document_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_one_epoch_reads_every_token_of_every_window_once(domains: dict[str, Shards]) -> None:
    windows = {name: windows_of(shards, SEQ) for name, shards in domains.items()}
    mixture = build_mixture({"general": {"share": 1, "domains": {"worked": 1}}}, windows, seed=9)
    batch = pretraining_batch(mixture, domains, 0, windows["worked"], SEQ)
    stream = domains["worked"].read(0, windows["worked"] * SEQ)
    assert Counter(batch.input_ids.flatten().tolist()) == Counter(stream.tolist())
    assert windows_of(domains["worked"], domains["worked"].tokens) == 0 and windows_of(domains["worked"], domains["worked"].tokens - 1) == 1


@pytest.mark.parametrize("most_windows", [None, 1, 7, 10**6])
def test_validation_predicts_every_token_once_and_counts_its_bytes(
    domains: dict[str, Shards], tokenizer: Tokenizer, most_windows: int | None
) -> None:
    for shards in domains.values():
        batches = list(validation_batches(shards, 5, SEQ, tokenizer.pad_id, most_windows))
        predicted = torch.cat([batch.labels[batch.labels >= 0] for batch in batches]).tolist()
        stream = shards.read(0, shards.tokens).tolist()
        windows = validation_windows(shards, SEQ, most_windows)
        first = set(shards.document_starts.tolist()) | {start for start, _ in windows}
        inside = [position for start, end in windows for position in range(start, end)]
        assert len(set(inside)) == len(inside) and sorted(inside) == inside
        assert predicted == [stream[position] for position in inside if position not in first]
        found = coverage(shards, tokenizer.text_bytes_per_id, SEQ, most_windows)
        assert found.windows == len(windows) and found.labels == len(predicted)
        assert found.text_bytes == sum(len(tokenizer.bytes_of(token)) for token in predicted)
        assert found.first_tokens == sum(position in first for position in inside)
        if len(inside) == shards.tokens:
            assert found.text_bytes + found.first_token_bytes == shards.text_bytes
        assert {batch.input_ids.shape[1] for batch in batches} == {SEQ} and len(batches) == math.ceil(found.windows / 5)
        for batch in batches:  # padding is its own document and nothing is learned there
            assert ((batch.document_ids[:, 1:] - batch.document_ids[:, :-1]) >= 0).all()
        pieces = list(validation_pieces(shards, SEQ, most_windows))
        assert [token for piece in pieces for token in piece.tolist()] == [stream[position] for position in inside]
        assert len(pieces) == found.first_tokens


def test_few_validation_windows_are_spread_over_the_whole_text(domains: dict[str, Shards]) -> None:
    for shards in domains.values():
        everything = validation_windows(shards, SEQ)
        assert everything[0][0] == 0 and everything[-1][1] == shards.tokens
        few = validation_windows(shards, SEQ, 4)
        assert set(few) < set(everything) and few[0] == everything[0] and few[-1][0] >= 0.7 * shards.tokens


def test_a_uniform_model_has_the_bits_per_byte_that_coverage_says(domains: dict[str, Shards], tokenizer: Tokenizer) -> None:
    shards, size = domains["worked"], tokenizer.vocab_size
    found = coverage(shards, tokenizer.text_bytes_per_id, SEQ)
    uniform = found.labels * math.log2(size) / found.text_bytes
    assert found.with_first_tokens(uniform, size) == pytest.approx(shards.tokens * math.log2(size) / shards.text_bytes)


def test_a_stream_shorter_than_one_window(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shards = write_shards([("a", "ab!")], tokenizer, tmp_path)
    (batch,) = validation_batches(shards, 4, SEQ, tokenizer.pad_id)
    ids = shards.read(0, shards.tokens).tolist()
    assert batch.labels[0, : len(ids) - 1].tolist() == ids[1:] and (batch.labels[0, len(ids) - 1 :] == -100).all()
    assert batch.document_ids[0].tolist() == [0] * len(ids) + [1] * (SEQ - len(ids))
    assert windows_of(shards, SEQ) == 0


def random_examples(seed: int, count: int, longest: int) -> list[tuple[list[int], list[int]]]:
    source = random.Random(seed)
    lengths = [source.randint(1, longest) for _ in range(count)]
    return [([source.randrange(500) for _ in range(n)], [source.randrange(2) for _ in range(n)]) for n in lengths]


@pytest.mark.parametrize("seed", range(4))
def test_packing_keeps_every_example_whole_once(seed: int) -> None:
    examples = random_examples(seed, count=150, longest=70)
    packed = pack(examples, seq_length=64, pad_id=999)
    fitting = [example for example in examples if len(example[0]) <= 64]
    assert packed.skipped == len(examples) - len(fitting) > 0
    found = []
    for row in packed.rows:
        assert row.input_ids.shape == row.labels.shape == row.document_ids.shape == (64,)
        for document in range(int(row.document_ids[-1]) + 1):
            (slots,) = np.nonzero(row.document_ids == document)
            assert (np.diff(slots) == 1).all()
            ids, labels = row.input_ids[slots].tolist(), row.labels[slots].tolist()
            if ids[0] == 999:
                assert set(ids) == {999} and set(labels) == {-100} and slots[-1] == 63
                continue
            found.append((ids, labels))
    expected = [(ids, [token if mask else -100 for token, mask in zip(ids[1:], mask[1:], strict=True)] + [-100]) for ids, mask in fitting]
    assert sorted(found) == sorted(expected)
    assert packed.filled == sum(len(ids) for ids, _ in fitting) / (64 * len(packed.rows))


def test_packing_is_tight_and_deterministic() -> None:
    examples = random_examples(5, count=600, longest=60)
    packed = pack(examples, 64, 0)
    fewest = math.ceil(sum(len(ids) for ids, _ in examples) / 64)
    assert len(packed.rows) <= 11 / 9 * fewest + 1 and packed.filled > 0.95
    again = pack(examples, 64, 0)
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(packed.rows, again.rows, strict=True))
    halves = pack([([1] * 32, [1] * 32)] * 10, 64, 0)
    assert len(halves.rows) == 5 and halves.filled == 1.0


def test_packing_nothing_is_a_user_error() -> None:
    with pytest.raises(UserError, match="none of 1 examples fits into 4 tokens"):
        pack([([1] * 5, [1] * 5)], 4, 0)
    with pytest.raises(UserError, match="none of 0 examples"):
        pack([], 4, 0)
    assert pack([([], []), ([7], [1])], 4, 0).skipped == 1


def test_packed_batches_walk_through_all_rows_each_epoch() -> None:
    rows = pack(random_examples(6, 40, 60), 64, 0).rows
    epochs = [packed_batch(rows, seed=1, first_index=len(rows) * epoch, batch_sequences=len(rows)) for epoch in range(2)]
    everything = sorted(rows_batch(rows).input_ids.tolist())
    assert all(sorted(batch.input_ids.tolist()) == everything for batch in epochs)
    assert epochs[0].input_ids.tolist() != epochs[1].input_ids.tolist()
    part = packed_batch(rows, 1, 3, 4)
    assert torch.equal(part.labels, epochs[0].labels[3:7]) and torch.equal(part.document_ids, epochs[0].document_ids[3:7])
