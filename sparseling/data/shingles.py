"""Word shingles as 64-bit numbers, fast: the common ground of near-duplicate removal and of decontamination."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

# Any odd number has an inverse modulo 2^64; this one (2^64 over the golden ratio) mixes well.
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 1 << 64)
BLOCK_WORDS = 1 << 16


def normalised(text: str) -> str:
    """What two texts are compared by: lower case, every run of white space one space."""
    return " ".join(text.lower().split())


def shingle_hashes(text: str, words: int) -> NDArray[np.uint64]:
    """The hash of each run of `words` consecutive words of the normalised text, in order: `[words in text - words + 1]`, or `[0]`.

    Equal runs have equal hashes, different ones different hashes but for an accident of about 2^-64 a pair.
    """
    data = np.frombuffer(normalised(text).encode("utf-8", "replace"), dtype=np.uint8)
    spaces = np.flatnonzero(data == ord(" "))
    count = len(spaces) + 2 - words
    if not len(data) or count < 1:
        return np.empty(0, dtype=np.uint64)
    starts = np.concatenate(([0], spaces + 1))[:count]
    ends = np.concatenate((spaces, [len(data)]))[words - 1 :]
    blocks = [slice(first, first + BLOCK_WORDS) for first in range(0, count, BLOCK_WORDS)]
    return np.concatenate([window_hashes(data, starts[block], ends[block]) for block in blocks])


def window_hashes(data: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hash of `data[start:end]` for each pair, `[windows]`; both `starts` and `ends` rise.

    A window's hash is the polynomial sum(byte_i * BASE^i) modulo 2^64 over its bytes (Karp and Rabin 1987), taken out of one running sum.
    """
    origin = starts[0]
    piece = data[origin : ends[-1]]
    running = np.zeros(len(piece) + 1, dtype=np.uint64)
    np.cumsum(piece * powers(BASE, len(piece)), out=running[1:])
    hashes = (running[ends - origin] - running[starts - origin]) * powers(INVERSE, len(piece))[starts - origin]
    # The low bits of such a polynomial depend on the low bits of the bytes only: fold the high ones in.
    hashes = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed: NDArray[np.uint64] = hashes ^ (hashes >> np.uint64(32))
    return mixed


def powers(base: int, count: int) -> NDArray[np.uint64]:
    """base^0 ... base^(count-1) modulo 2^64."""
    return power_table(base, count.bit_length())[:count]


@functools.lru_cache(maxsize=64)
def power_table(base: int, bits: int) -> NDArray[np.uint64]:
    factors = np.full(1 << bits, base, dtype=np.uint64)
    factors[0] = 1
    table: NDArray[np.uint64] = np.multiply.accumulate(factors)
    return table
