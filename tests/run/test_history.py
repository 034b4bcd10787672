"""Penalties, biases and log-probabilities against their definitions."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from sparseling.run.history import History, log_probabilities
from sparseling.run.sampler import Sampling


@pytest.mark.parametrize("sampling", [
    Sampling(repetition_penalty=1.3), Sampling(repetition_penalty=1.0, presence_penalty=0.7), Sampling(frequency_penalty=-0.3),
    Sampling(repetition_penalty=0.8, presence_penalty=-1.5, frequency_penalty=2.0, logit_bias=((3, 4.0), (5, -100.0), (3, 1.0))),
    Sampling(repetition_penalty=1.0, logit_bias=((0, 0.5),)), Sampling(repetition_penalty=1.0),
])  # fmt: skip
def test_logits_are_changed_as_defined_at_every_length(sampling: Sampling) -> None:
    random = np.random.default_rng(1)
    prompt, answer = random.integers(0, 100, 90).tolist(), random.integers(0, 150, 120).tolist()
    history = History(sampling, prompt)
    for length in range(len(answer)):
        logits = random.standard_normal(200).astype(np.float32)
        want, said = logits.astype(np.float64), Counter(answer[:length])
        for token in set(prompt) | set(said):
            want[token] = want[token] / sampling.repetition_penalty if want[token] > 0 else want[token] * sampling.repetition_penalty
        for token, count in said.items():
            want[token] -= sampling.presence_penalty + sampling.frequency_penalty * count
        for token, bias in sampling.logit_bias:
            want[token] += bias
        history.adjust(logits)
        np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
        history.push(answer[length])


def test_log_probabilities_are_those_of_the_softmax_best_first_and_equal_ones_by_id() -> None:
    logits = np.round(np.random.default_rng(2).standard_normal(300) * 2).astype(np.float32)
    want = logits - math.log(sum(math.exp(float(x)) for x in logits))
    for best in (0, 1, 7, 300, 400):
        logprob, top = log_probabilities(logits, 17, best)
        assert logprob == pytest.approx(want[17])
        assert [token for token, _ in top] == sorted(range(300), key=lambda token: (-logits[token], token))[:best]
        assert [value for _, value in top] == pytest.approx([want[token] for token, _ in top])
