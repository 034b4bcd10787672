"""What a generated problem is, and the split by prompt that keeps evaluation problems out of every training text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_SHARE = 0.1
VALIDATION_SHARE = 0.05


@dataclass(frozen=True)
class Problem:
    """A question with its worked solution.

    `content` is what is asked, without the wording: for a sum the unordered operands, so that a held-out sum is held out in every
    wording and in both orders. `steps` are the lines of the solution; `answer` is what follows from them.
    """

    task: str
    prompt: str
    steps: tuple[str, ...]
    answer: str
    content: str


@dataclass(frozen=True)
class Family:
    """A family of problems: `make` draws one from a seeded generator; `about` says in a line what is asked."""

    name: str
    about: str
    make: Callable[[random.Random], Problem]

    def problem(self, seed: int, index: int) -> Problem:
        """Problem `index` of the stream `seed`: a pure function of both."""
        return self.make(random.Random(f"{self.name}/{seed}/{index}"))


def is_held_out(problem: Problem, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a problem is kept for evaluation (a `share` of all); depends on its content alone, not on family, wording or seed."""
    return _place(problem) < share


def is_for_validation(problem: Problem, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a problem is kept for validation text: `VALIDATION_SHARE` of those that evaluation leaves."""
    return share <= _place(problem) < share + VALIDATION_SHARE * (1 - share)


def _place(problem: Problem) -> float:
    """A number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(problem.content.encode()).digest()[:8], "big") / 2**64
