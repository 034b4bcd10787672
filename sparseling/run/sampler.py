"""From logits to the next token: penalties and biases, temperature, top-k, top-p, min-p, one uniform draw per token.

A sequence's draws depend on the seed and its own number alone, and every row is treated by itself: what else is in the batch never
changes what is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError, UserError
from ..kernels.library import call, load_library

GREEDY_BELOW = 1e-5  # dividing by less would leave the range of float32
HOTTEST = 3e38  # what float32 holds
MOST_BIAS = 100.0  # of a token in `logit_bias`, and MOST_PENALTY of the other two: the ranges of the OpenAI API
MOST_PENALTY = 2.0
MOST_REPETITION = 1e9  # nothing beyond has a use, and logits must stay finite


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 are off, `repetition_penalty` 1 is off, all else at 0.

    `min_p` drops tokens less likely than so much of the likeliest one; `presence_penalty` is taken from the logit of every token that is in
    the answer so far, `frequency_penalty` as often as it is there; `logit_bias` (token, number) is added to logits. The defaults are
    those of the published chat models. Raises `UsageError` naming the key that is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.8
    top_k: int = 0
    repetition_penalty: float = 1.05
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for key in ("temperature", "top_p", "repetition_penalty", "min_p", "presence_penalty", "frequency_penalty"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UsageError(f"{key}: {value!r} is not a number; give one such as {getattr(Sampling, key)}")
        for key in ("top_k", "seed"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UsageError(f"{key}: {value!r} is not a whole number; give one such as 0")
            if value < 0:
                raise UsageError(f"{key}: {value} is negative; give 0 or more")
        if self.temperature < 0:
            raise UsageError(f"temperature: {self.temperature} is negative; give 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: {self.top_p} is not above 0 and at most 1; 1 turns it off")
        if not 1 / MOST_REPETITION <= self.repetition_penalty <= MOST_REPETITION:
            raise UsageError(f"repetition_penalty: {self.repetition_penalty} is not between 1e-9 and 1e9; 1 turns it off")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p: {self.min_p} is not between 0 and 1; 0 turns it off")
        for key in ("presence_penalty", "frequency_penalty"):
            if abs(getattr(self, key)) > MOST_PENALTY:
                raise UsageError(f"{key}: {getattr(self, key)} is not between -2 and 2; 0 turns it off")
        for token, bias in self.logit_bias:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise UsageError(f"logit_bias: {token!r} is not a token; give token ids")
            if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) <= MOST_BIAS:
                raise UsageError(f"logit_bias: {bias!r} of token {token} is not between -100 and 100; give a number in that range")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens that came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


NOT_FINITE = "model: its logits are not finite numbers; the weights are damaged or training diverged, use another checkpoint"
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0)


def uniform_draws(seed: int, sequences: Iterable[int], tokens: int) -> Tensor:
    """The randomness of whole sequences: [sequences, tokens] float64 in [0, 1). Each row depends on (seed, its number) alone, and a
    shorter row is the beginning of a longer one."""
    rows = [np.random.default_rng((seed, sequence)).random(tokens) for sequence in sequences]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, tokens, dtype=torch.float64)


def next_tokens(logits: Tensor, history: Tensor | None, sampling: Sampling, draws: Tensor | None) -> Tensor:
    """The next token of each row, [batch] int64.

    logits [batch, vocab] float32; history [batch, tokens] int64, the tokens of prompt and output so far, repeats allowed (None: no
    repetition penalty); draws [batch] float64 in [0, 1) (None when greedy). In order: repetition penalty (CTRL §4.1: positive logits
    divided, negative ones multiplied), temperature, top-k, top-p (the fewest best tokens whose probability reaches `top_p`). Equal
    logits rank by id. Raises `UserError` for logits that are NaN or infinite.
    """
    if history is not None and sampling.repetition_penalty != 1:
        scores = logits.gather(1, history)
        scores = torch.where(scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty)
        logits = logits.scatter(1, history, scores)
    best, tokens = logits.max(dim=-1)
    if not torch.isfinite(best).all():
        raise UserError(NOT_FINITE)
    if sampling.greedy:
        return tokens
    assert draws is not None, "sampling needs draws"
    if logits.device.type == "cpu" and can_draw():
        return draw(logits, torch.arange(len(logits)), [sampling] * len(logits), draws)
    scores = (logits - best[:, None]).div_(sampling.temperature)                 # the best is 0, so exp cannot overflow
    weights = scores.exp()
    if 0 < sampling.top_k < logits.shape[1] or sampling.top_p < 1:
        weights.masked_fill_(~kept_tokens(scores, weights, sampling), 0)
    if sampling.min_p > 0:
        weights.masked_fill_(weights < sampling.min_p, 0)                        # the best weighs 1
    return pick(weights, draws)


def can_draw() -> bool:
    """Whether `draw` is there: the C++ kernels are."""
    return load_library()[0] is not None


def draw(logits: Tensor, rows: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """The next tokens int64 of some rows (int64) of logits [., vocab] float32 on the CPU, each by its own sampling, which is not greedy.

    One call of the C++ kernel (csrc/draw.h); penalties and biases have been applied, the best logit of each row is finite.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(len(rows), dtype=torch.int64)
    call("draw", len(rows), logits.shape[1], logits.stride(0), logits, rows,
         torch.tensor([min(sampling.temperature, HOTTEST) for sampling in samplings], dtype=torch.float32),
         torch.tensor([min(sampling.top_k, 2**62) for sampling in samplings]),
         torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64),
         torch.tensor([sampling.min_p for sampling in samplings], dtype=torch.float32), draws.double().contiguous(), tokens)
    return tokens


def kept_tokens(scores: Tensor, weights: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens top-k and then top-p keep, [batch, vocab] bool; scores [batch, vocab] are log-probabilities up to a constant, weights
    their exponentials.

    Only values are sorted, never ids: the tokens above the last kept value stay, and of those equal to it the first few by id.
    """
    batch, vocab = scores.shape
    if 0 < sampling.top_k < vocab:
        best = scores.topk(sampling.top_k, dim=-1).values                        # [batch, k], best first
        total = best.exp().cumsum(-1, dtype=torch.float64)[:, -1:]               # in one order at any batch size, unlike a sum
    else:
        total = weights.cumsum(-1, dtype=torch.float64)[:, -1:]
        # All tokens below this floor together weigh less than half of what top-p leaves out: none of them is kept.
        best = sorted_values(scores, ((1 - sampling.top_p) * total / (2 * vocab)).log())
    count = torch.full((batch, 1), best.shape[1], device=scores.device)
    if sampling.top_p < 1:
        mass = best.exp().cumsum(-1, dtype=torch.float64)
        better = mass - best.exp()                                               # mass of the tokens that rank before
        count = (better < sampling.top_p * total).sum(-1, keepdim=True)
    last = best.gather(1, count - 1)                                             # [batch, 1]
    kept = scores >= last
    if bool((kept.sum(-1, keepdim=True) > count).any()):
        equal = scores == last
        room = count - (scores > last).sum(-1, keepdim=True)
        kept &= ~equal | (equal.cumsum(-1) <= room)
    return kept


def sorted_values(scores: Tensor, floor: Tensor) -> Tensor:
    """The scores of each row, best first; those below floor [batch, 1] may be missing or -inf.

    On the CPU by NumPy, whose vectorised sort is many times faster than torch's, and only what is above the floor.
    """
    if scores.device.type != "cpu":
        return scores.sort(dim=-1, descending=True).values
    rows = [np.sort(-row[row >= least]) for row, least in zip(scores.numpy(), floor.numpy(), strict=True)]
    best = np.full((len(rows), max(map(len, rows))), -np.inf, dtype=np.float32)
    for target, row in zip(best, rows, strict=True):
        target[:len(row)] = -row
    return torch.from_numpy(best)


def pick(weights: Tensor, draws: Tensor) -> Tensor:
    """Where the draw falls: weights [batch, n], not negative, in any scale; draws [batch] float64 in [0, 1) -> index [batch].

    Never one of weight 0: the wanted mass is kept below the total, which rounding could otherwise reach.
    """
    mass = weights.cumsum(-1, dtype=torch.float64)
    total = mass[:, -1:]
    wanted = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(mass, wanted, right=True).squeeze(1)
