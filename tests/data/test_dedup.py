"""Near duplicates against a brute-force Jaccard over sets of word tuples, and 13-gram overlap against string search."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseling.data import dedup, shingles
from sparseling.data.dedup import exact_duplicates, near_duplicates, overlapping, text_hash
from sparseling.data.shingles import shingle_hashes

WORDS = [f"w{number}" for number in range(3_000)]


def tuples(text: str, words: int = 5) -> list[tuple[str, ...]]:
    split = text.lower().split()
    return [tuple(split[start : start + words]) for start in range(len(split) - words + 1)]


def brute_jaccard(first: set[tuple[str, ...]], second: set[tuple[str, ...]]) -> float:
    return len(first & second) / len(first | second)


def random_text(chance: random.Random, words: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(words))


def planted(seed: int, documents: int = 100) -> list[str]:
    """Random texts, half of them followed by a copy in which up to 11 of about 200 words are replaced."""
    chance = random.Random(seed)
    texts = []
    for number in range(documents):
        words = random_text(chance, chance.randrange(150, 250)).split()
        texts.append(" ".join(words))
        if number % 2:
            for place in chance.sample(range(len(words)), chance.randrange(0, 12)):
                words[place] = chance.choice(WORDS)
            texts.append(" ".join(words))
    return texts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab", "A", "é", "日本", "", "\n", "-"]), max_size=40), st.integers(1, 6))
def test_hashes_are_equal_exactly_where_the_words_are(pieces: list[str], words: int) -> None:
    text = " ".join(pieces)
    hashes, expected = shingle_hashes(text, words), tuples(text, words)
    assert len(hashes) == len(expected)
    for first in range(len(expected)):
        for second in range(first):
            assert (hashes[first] == hashes[second]) == (expected[first] == expected[second])


def test_hashes_do_not_depend_on_the_text_around_or_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_text(random.Random(0), 500)
    whole = shingle_hashes(text, 5)
    assert np.array_equal(shingle_hashes(" ".join(text.split()[100:200]), 5), whole[100:196])
    monkeypatch.setattr(shingles, "BLOCK_WORDS", 7)
    assert np.array_equal(shingle_hashes(text, 5), whole)


def test_exact_duplicates_ignore_case_and_white_space_only() -> None:
    texts = ["One two.", "one   TWO.\n", "one two!", "One two."]
    assert exact_duplicates(map(text_hash, texts)) == [False, True, False, True]


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_against_brute_force(seed: int) -> None:
    texts = planted(seed)
    kept: list[set[tuple[str, ...]]] = []
    below = above = 0
    for text, flag in zip(texts, near_duplicates(texts, threshold=0.8, seed=seed), strict=True):
        own = set(tuples(text))
        best = max((brute_jaccard(own, other) for other in kept), default=0.0)
        if flag:
            assert best >= 0.8  # nothing is dropped that is no near duplicate
        else:
            assert best < 0.85  # above this the chance of a miss is under 1 in 1000
            kept.append(own)
        below += 0.6 < best < 0.8
        above += best >= 0.8
    assert above > 10 and below > 5  # the planted pairs stand on both sides of the threshold


def test_texts_from_one_template_are_kept_and_do_not_cost_a_comparison_each(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(11)
    template = random_text(chance, 60)
    texts = [f"{template} {random_text(chance, 30)}" for _ in range(400)]
    assert 0.4 < brute_jaccard(set(tuples(texts[0])), set(tuples(texts[1]))) < 0.5
    compared: list[float] = []
    real = dedup.jaccard
    monkeypatch.setattr(dedup, "jaccard", lambda first, second: compared.append(real(first, second)) or compared[-1])
    assert not any(near_duplicates(texts))
    assert len(compared) < 400 * 399 / 2 / 100


def test_near_duplicates_are_the_same_on_every_run_and_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = planted(3, documents=60)
    flags = near_duplicates(texts)
    assert near_duplicates(texts) == flags
    monkeypatch.setattr(dedup, "BATCH_SHINGLES", 500)
    assert near_duplicates(texts) == flags


def test_near_duplicates_keeps_the_first_and_short_texts() -> None:
    text = random_text(random.Random(5), 100)
    assert near_duplicates([text, "too short", "too short", "", "", text, text + " more"]) == [False] * 5 + [True] * 2
    assert near_duplicates([]) == []


def test_overlap_is_a_run_of_13_words() -> None:
    chance = random.Random(7)
    prompt = random_text(chance, 30).split()
    filler = random_text(chance, 50)
    inside = [f"{filler} {' '.join(prompt[4 : 4 + length])} {filler}" for length in (12, 13, 14)]
    assert overlapping(inside, [" ".join(prompt)]) == [False, True, True]


def test_overlap_ignores_case_and_punctuation() -> None:
    prompt = "Natalia sold clips to 48 of her friends in April, and then she sold half as many."
    text = "... NATALIA sold clips -- to 48 of her friends (in April) and then she sold\nhalf as many!"
    assert overlapping([text, text.replace("48", "49")], [prompt]) == [True, False]


def test_short_prompts_are_compared_whole_and_phrases_not_at_all() -> None:
    assert overlapping(["say what is the capital of france in one word now"], ["What is the capital of France in one word?"]) == [True]
    assert overlapping(["so what is the capital"], ["What is the capital?"]) == [False]
    assert overlapping(["any text"], []) == [False]
