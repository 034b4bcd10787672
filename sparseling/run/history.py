"""What a sequence has said so far, as its penalties and biases need it; and the log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .sampler import Sampling


class History:
    """The different tokens of prompt and answer, each once, and how often each is in the answer.

    Kept as it grows: a step costs time in the number of different tokens, not in the length of the text.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self.sampling = sampling
        self.place: dict[int, int] = {}
        self.tokens = np.zeros(64, dtype=np.int64)
        self.counts = np.zeros(64, dtype=np.float32)
        self.bias_tokens = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self.bias = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)
        if sampling.penalises:
            for token in prompt:
                self.slot(token)

    def slot(self, token: int) -> int:
        """Where a token stands; new ones at the end."""
        place = self.place.setdefault(token, len(self.place))
        if place == len(self.tokens):
            self.tokens, self.counts = (np.concatenate([array, np.zeros_like(array)]) for array in (self.tokens, self.counts))
        self.tokens[place] = token
        return place

    def push(self, token: int) -> None:
        """One more token of the answer."""
        if self.sampling.penalises:
            place = self.slot(token)                                             # may replace the arrays
            self.counts[place] += 1

    def adjust(self, logits: np.ndarray) -> None:
        """Change the logits [vocab] float32 of the next token in place: repetition penalty, then presence and frequency, then biases."""
        sampling, n = self.sampling, len(self.place)
        if n:
            tokens, counts = self.tokens[:n], self.counts[:n]
            scores = logits[tokens]
            if sampling.repetition_penalty != 1:
                scores = np.where(scores > 0, scores / np.float32(sampling.repetition_penalty),
                                  scores * np.float32(sampling.repetition_penalty))
            if sampling.presence_penalty or sampling.frequency_penalty:
                scores -= np.float32(sampling.frequency_penalty) * counts + np.float32(sampling.presence_penalty) * (counts > 0)
            logits[tokens] = scores
        if len(self.bias):
            np.add.at(logits, self.bias_tokens, self.bias)


def log_probabilities(logits: np.ndarray, token: int, best: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of `token`, and the `best` likeliest tokens with theirs, likeliest first (equal ones by id).

    logits [vocab] float32 as the model gave them.
    """
    best = min(best, len(logits))
    exact = logits.astype(np.float64)
    top = exact.max()
    norm = top + np.log(np.exp(exact - top).sum())
    if best == 0:
        return float(exact[token] - norm), ()
    last = np.partition(exact, -best)[-best]
    ids = np.flatnonzero(exact >= last)
    ids = ids[np.lexsort((ids, -exact[ids]))][:best]
    return float(exact[token] - norm), tuple((int(i), float(exact[i] - norm)) for i in ids)
