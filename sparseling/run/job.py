"""What a scheduler is asked for, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from .history import History
from .sampler import Sampling

FinishReason = Literal["stop", "length", "cancelled", "failed"]
RoutingOf = Literal["nothing", "answer", "all"]


class Constraint(Protocol):
    """A grammar that an answer keeps to."""

    def allowed(self) -> np.ndarray:
        """[vocab] bool: the tokens that may come next; stop tokens among them where the answer may end."""
        ...

    def push(self, token: int) -> None:
        """The answer goes on with `token`."""
        ...


@dataclass(eq=False)
class Job:
    """One sequence: prompt and answer in `ids`, of which the cache holds `computed`. `draws` gives one number in [0, 1) a new token.

    `routed`: the position up to which routing was reported; `hidden_sum` [hidden] fp64 of a job that is an embedding; `failure` says why
    a job failed; `drafts` are guesses of the tokens after the next step's, of a job that `speculates` (None: not let
    in yet); `first_key` begins the keys of its pages.
    """

    ids: list[int]
    prompt_tokens: int
    most_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    draws: np.random.Generator
    top_logprobs: int | None = None
    routing: RoutingOf = "nothing"
    constraint: Constraint | None = None
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cached_tokens: int = 0
    routed: int = 0
    hidden_sum: np.ndarray | None = None
    drafts: list[int] = field(default_factory=list)
    speculates: bool | None = None
    first_key: bytes = b""
    finish: FinishReason | None = None
    failure: str = ""

    def __post_init__(self) -> None:
        remembers = self.sampling.penalises or self.sampling.logit_bias
        self.history = History(self.sampling, self.ids) if remembers else None
        self.routed = self.prompt_tokens if self.routing == "answer" else 0

    @property
    def answer(self) -> list[int]:
        """The new tokens."""
        return self.ids[self.prompt_tokens:]


@dataclass(frozen=True)
class RoutingRows:
    """How tokens were routed as they were read: those at positions `first`, `first` + 1, ... of prompt and answer. `expert_ids` [tokens,
    layers, k] int32 and `weights` likewise fp32, by MoE layer; `scores` [tokens, layers, experts] fp32 before the bias."""

    first: int
    expert_ids: np.ndarray
    weights: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Progress:
    """What a step brought to one job: a token, or none when it ended at a stop token or only routing came; `finish` when it is over.

    `logprob` of the token and `top_logprobs` (token, log-probability) come from the logits as the model gave them. `routing` is that of the
    tokens that this step read: a new token is read by the step after it.
    """

    job: Job
    token: int | None
    finish: FinishReason | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    routing: RoutingRows | None = None
