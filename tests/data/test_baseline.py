"""The baselines: true probabilities, equal to a brute-force definition, near the entropy of a known source."""

from __future__ import annotations

import gzip
import lzma
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from sparseling.data import baseline
from sparseling.data.baseline import baseline_bits_per_byte, compressed_bits_per_byte, train_order2
from sparseling.errors import UserError

from .small_corpus import HARD_TEXTS, corpus


def with_contexts(texts: list[str]) -> list[tuple[bytes, int]]:
    """(the two symbols before, the symbol), document by document."""
    found = []
    for text in texts:
        symbols = b"\xff\xff" + text.encode() + b"\xff"
        found += [(symbols[n - 2 : n], symbols[n]) for n in range(2, len(symbols))]
    return found


class BruteForce:
    """Interpolated modified Kneser-Ney written from its definition, with dictionaries."""

    def __init__(self, texts: list[str]) -> None:
        trigrams = Counter((context, symbol) for context, symbol in with_contexts(texts))
        self.tables: list[dict[bytes, Counter[int]]] = [defaultdict(Counter) for _ in range(3)]
        for (context, symbol), count in trigrams.items():
            self.tables[2][context][symbol] += count
        for length in (1, 0):
            for context, counts in self.tables[length + 1].items():
                for symbol in counts:
                    self.tables[length][context[1:]][symbol] += 1
        self.discounts = [self._discounts(table) for table in self.tables]

    @staticmethod
    def _discounts(table: dict[bytes, Counter[int]]) -> list[float]:
        number = Counter(count for counts in table.values() for count in counts.values())
        if not (number[1] and number[2] and number[3]):
            return [0, 0.5, 1.0, 1.5]
        y = number[1] / (number[1] + 2 * number[2])
        raw = [n - (n + 1) * y * number[n + 1] / number[n] for n in (1, 2, 3)]
        return [0, *(min(max(d, 0.05), n) for n, d in enumerate(raw, start=1))]

    def probability(self, context: bytes, symbol: int) -> float:
        lower = self.probability(context[1:], symbol) if context else 1 / 256
        counts = self.tables[len(context)].get(context)
        if not counts:
            return lower
        taken = [self.discounts[len(context)][min(count, 3)] for count in counts.values()]
        kept = counts[symbol] - self.discounts[len(context)][min(counts[symbol], 3)]
        return (kept + sum(taken) * lower) / sum(counts.values())


@pytest.mark.parametrize("documents", [1, 3, 40])
def test_cost_equals_the_definition(documents: int) -> None:
    training, validation = corpus(1, documents), [*corpus(2, 5), *HARD_TEXTS[4:8]]
    brute = BruteForce(training)
    expected = -sum(math.log2(brute.probability(context, symbol)) for context, symbol in with_contexts(validation))
    bits, text_bytes = train_order2(training).bits(validation)
    assert bits == pytest.approx(expected, rel=1e-9)
    assert text_bytes == sum(len(text.encode()) for text in validation)


def test_probabilities_are_positive_and_sum_to_one_after_every_kind_of_context() -> None:
    for training in (corpus(3, 60), ["a"], [""], ["ab" * 500]):
        model = train_order2(training)
        for before in (b"\xff\xff", b"\xffa", b"ab", b"e ", b"th", b"\x00\x01", b"\xf0\x9f", b"zz"):
            probabilities = model.probabilities(before)
            assert probabilities.shape == (256,) and (probabilities > 0).all()
            assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_an_independent_source_costs_its_entropy() -> None:
    source = random.Random(1)
    letters, weights = "abcdefgh", [0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01]
    entropy = -sum(weight * math.log2(weight) for weight in weights)
    training = ["".join(source.choices(letters, weights, k=300_000))]
    validation = ["".join(source.choices(letters, weights, k=100_000))]
    result = baseline_bits_per_byte(training, validation)
    assert result["order2"] == pytest.approx(entropy, rel=0.005)
    assert result["gzip"] > entropy and result["lzma"] > entropy


def test_an_order_two_source_costs_next_to_nothing_where_lower_orders_fail() -> None:
    """A de Bruijn cycle: each letter is fixed by the two before it, but after one letter all three are as likely."""
    text = "aabacbbcc" * 1000
    assert baseline_bits_per_byte([text], [text])["order2"] < 0.02
    model = train_order2([text])
    assert model.probabilities(b"ba")[ord("c")] > 0.99


def test_it_beats_the_weaker_smoothing_it_was_chosen_over() -> None:
    """Witten-Bell on the same counts costs more: the baseline is not a straw man."""
    training, validation = corpus(5, 100), corpus(6, 30)
    tables: list[dict[bytes, Counter[int]]] = [defaultdict(Counter) for _ in range(3)]
    for context, symbol in with_contexts(training):
        for length in range(3):
            tables[length][context[2 - length :]][symbol] += 1

    def witten_bell(context: bytes, symbol: int) -> float:
        lower = witten_bell(context[1:], symbol) if context else 1 / 256
        counts = tables[len(context)].get(context)
        return lower if not counts else (counts[symbol] + len(counts) * lower) / (counts.total() + len(counts))

    weaker = -sum(math.log2(witten_bell(context, symbol)) for context, symbol in with_contexts(validation))
    assert train_order2(training).bits(validation)[0] < weaker


def test_a_cut_text_is_charged_for_no_end() -> None:
    texts = corpus(4, 30)
    model, ended = train_order2(texts), [n % 3 > 0 for n in range(len(texts))]
    whole, _ = model.bits(texts)
    ends = [-math.log2(model.probabilities((b"\xff\xff" + text.encode())[-2:])[0xFF]) for text in texts]
    expected = whole - sum(cost for cost, flag in zip(ends, ended, strict=True) if not flag)
    assert model.bits(texts, ended)[0] == pytest.approx(expected, rel=1e-9) and expected < whole - 20
    joined = b"".join(text.encode() + b"\xff" * flag for text, flag in zip(texts, ended, strict=True))
    assert compressed_bits_per_byte(texts, ended)["gzip"] == 8 * len(gzip.compress(joined, 9)) / sum(len(t.encode()) for t in texts)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    training, validation = corpus(1, 30), corpus(2, 10)
    whole = train_order2(training)
    bits = whole.bits(validation)[0]
    monkeypatch.setattr(baseline, "_BYTES_PER_CHUNK", 3000)
    pieces = train_order2(iter(training))
    assert all(np.array_equal(a, b) for a, b in zip(whole.counts, pieces.counts, strict=True))
    assert pieces.bits(iter(validation))[0] == pytest.approx(bits, rel=1e-12)


def test_compressors_equal_the_standard_ones() -> None:
    texts = corpus(4, 50)
    stream = b"".join(text.encode() + b"\xff" for text in texts)
    size = sum(len(text.encode()) for text in texts)
    found = compressed_bits_per_byte(texts)
    assert found["gzip"] == pytest.approx(len(gzip.compress(stream, 9)) * 8 / size, rel=0.01)
    assert found["lzma"] == len(lzma.compress(stream, preset=9 | lzma.PRESET_EXTREME)) * 8 / size


def test_nothing_to_count_is_a_user_error() -> None:
    with pytest.raises(UserError, match="no training text"):
        train_order2([])
    for empty in ([], [""]):
        with pytest.raises(UserError, match="validation text is empty"):
            baseline_bits_per_byte(["some text"], empty)
