"""Removal of repeated documents and of those that overlap with evaluation prompts.

Repeats waste training and, when one copy lands in the validation split, make its figures too good (Lee et al. 2022, "Deduplicating training
data makes language models better").
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .shingles import normalised, shingle_hashes

# 40 bands of 10 rows: a pair of Jaccard similarity s is a candidate with probability 1 - (1 - s^10)^40: 0.9998 at 0.85, 0.989 at 0.8, and
# 0.038 at 0.5, so that texts made from one template do not all meet each other.
BANDS = 40
ROWS = 10
# The signature's estimate of a similarity of 0.8 has standard deviation sqrt(0.8 * 0.2 / 400) = 0.02: this is five of them.
ESTIMATE_MARGIN = 0.1
SHINGLE_WORDS = 5
# Signatures are made of this many shingles at once, to bound memory.
BATCH_SHINGLES = 1 << 23
LEAST_PROMPT_WORDS = 8


def text_hash(text: str) -> bytes:
    """16 bytes that are equal for texts that differ in case and white space only."""
    return hashlib.blake2b(normalised(text).encode("utf-8", "replace"), digest_size=16).digest()


def exact_duplicates(hashes: Iterable[bytes]) -> list[bool]:
    """Whether each text, given by its `text_hash`, repeats an earlier one."""
    seen: set[bytes] = set()
    flags = []
    for key in hashes:
        flags.append(key in seen)
        seen.add(key)
    return flags


def near_duplicates(texts: Sequence[str], threshold: float = 0.8, seed: int = 0) -> list[bool]:
    """Whether each text has a kept earlier one of Jaccard similarity >= `threshold` between their sets of 5-word shingles.

    MinHash signatures and locality-sensitive hashing (library rensa) find candidates; each likely pair is then compared exactly, so a
    flagged text really is a near duplicate; one that is not flagged may be one with the small probability that `BANDS` and `ROWS` give.
    The first in order is the one that stays. The same texts and seed give the same flags. Texts of under 5 words are never flagged.
    """
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold, BANDS * ROWS, BANDS)
    kept: dict[int, tuple[RMinHash, NDArray[np.uint64]]] = {}
    flags = [False] * len(texts)
    for row in candidate_rows(texts, threshold, seed):
        shingles = np.unique(shingle_hashes(texts[row], SHINGLE_WORDS))
        sketch = RMinHash(BANDS * ROWS, seed)
        sketch.update([shingle.tobytes() for shingle in shingles])
        met = (kept[other] for other in index.query(sketch))
        likely = (others for other_sketch, others in met if sketch.jaccard(other_sketch) >= threshold - ESTIMATE_MARGIN)
        flags[row] = any(jaccard(shingles, others) >= threshold for others in likely)
        if not flags[row]:
            index.insert(row, sketch)
            kept[row] = sketch, shingles
    return flags


def candidate_rows(texts: Sequence[str], threshold: float, seed: int) -> list[int]:
    """The texts, in order, that share a signature band with any other: few, so that looking closer at them is cheap."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold, BANDS * ROWS, BANDS)
    signatures = []
    rows: list[int] = []
    for batch in batches_of_hashes(texts):
        offsets = np.cumsum([0, *(len(hashes) for _, hashes in batch)], dtype=np.uint64)
        flat = np.concatenate([hashes for _, hashes in batch])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, seed)
        index.insert_matrix(matrix, len(rows))
        signatures.append(matrix)
        rows += [row for row, _ in batch]
    flags = [flag for matrix in signatures for flag in index.query_duplicate_flags_matrix(matrix)]
    return [row for row, flag in zip(rows, flags, strict=True) if flag]


def batches_of_hashes(texts: Iterable[str]) -> Iterator[list[tuple[int, NDArray[np.uint64]]]]:
    """`(row, shingle hashes)` of the texts that have any, in lists of about `BATCH_SHINGLES` shingles."""
    batch: list[tuple[int, NDArray[np.uint64]]] = []
    size = 0
    for row, text in enumerate(texts):
        hashes = shingle_hashes(text, SHINGLE_WORDS)
        if len(hashes):
            batch.append((row, hashes))
            size += len(hashes)
        if size >= BATCH_SHINGLES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def jaccard(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> float:
    """Size of the intersection over size of the union of two sorted arrays without repeats."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both) if both else 0.0


def overlapping(texts: Iterable[str], prompts: Iterable[str], n: int = 13) -> list[bool]:
    """Whether each text shares a run of `n` words with an evaluation prompt, case, punctuation and white space aside.

    The 13-gram rule of Brown et al. 2020 (GPT-3), appendix C. A prompt of fewer than `n` words is compared as a whole when it has at least
    8, the least length used there; shorter ones are common phrases and are left out.
    """
    wanted: dict[int, list[NDArray[np.uint64]]] = {}
    for prompt in prompts:
        plain = words_only(prompt)
        length = min(n, plain.count(" ") + 1)
        if length >= min(n, LEAST_PROMPT_WORDS):
            wanted.setdefault(length, []).append(shingle_hashes(plain, length))
    grams = {length: np.unique(np.concatenate(hashes)) for length, hashes in wanted.items()}
    flags = []
    for text in texts:
        plain = words_only(text) if grams else ""
        flags.append(any(np.isin(shingle_hashes(plain, length), known).any() for length, known in grams.items()))
    return flags


def words_only(text: str) -> str:
    """Lower-case words with one space between; punctuation is a space."""
    return " ".join(re.sub(r"[\W_]+", " ", text.lower()).split())
