"""The families by name, and their three streams, no problem in two of them: training, validation text, evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...errors import UserError, nearest
from . import arithmetic, lists, stories
from .problem import HELD_OUT_SHARE, Family, Problem, is_for_validation, is_held_out

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("two_digit_addition", "add two numbers from 10 to 99", arithmetic.two_digit_addition),
        Family("two_digit_subtraction", "subtract two numbers from 10 to 99", arithmetic.two_digit_subtraction),
        Family("three_digit_subtraction", "subtract two numbers from 100 to 999", arithmetic.three_digit_subtraction),
        Family("multiplication", "multiply a two-digit number by a digit", arithmetic.multiplication),
        Family("sequence", "continue a sequence that grows by a fixed step", arithmetic.sequence),
        Family("maximum", "find the largest of three numbers", lists.maximum),
        Family("sort_numbers", "sort three or four two-digit numbers", lists.sort_numbers),
        Family("sort_letters", "sort three letters", lists.sort_letters),
        Family("reverse_letters", "reverse four letters", lists.reverse_letters),
        Family("count_letter", "count a letter in a list of letters", lists.count_letter),
        Family("gain_problem", "a story about a sum of two numbers from 10 to 99", stories.gain_problem),
        Family("word_problem", "a story with one gain and one loss", stories.word_problem),
    )
}

# What a model of about a million active parameters learns within a few million tokens; no constant answer scores well on any.
LAPTOP = ("two_digit_addition", "two_digit_subtraction", "maximum", "sort_letters", "reverse_letters")

_TRIES = 256  # at a share of 0.9 held out, 256 draws fail once in 10^11
_PATIENCE = 10_000  # draws without a new held-out problem after which a family has no more


def family(name: str) -> Family:
    """The family called `name`; an unknown name is a `UserError` with the nearest known one."""
    if name not in FAMILIES:
        raise UserError(f"tasks: there is no task '{name}'; {nearest(name, FAMILIES)}")
    return FAMILIES[name]


def training_problem(task: str, seed: int, index: int, held_out_share: float = HELD_OUT_SHARE) -> Problem:
    """Training problem `index` of the stream `seed`: a pure function of both, never one kept for evaluation or validation."""
    for attempt in range(_TRIES):
        problem = family(task).problem(seed, index * _TRIES + attempt)
        if not is_held_out(problem, held_out_share) and not is_for_validation(problem, held_out_share):
            return problem
    raise UserError(f"held_out_share: {held_out_share} leaves nothing of '{task}' to train on; use a smaller share")


def validation_problem(task: str, seed: int, index: int, held_out_share: float = HELD_OUT_SHARE) -> Problem:
    """Problem `index` of the validation stream `seed`: never in training text, never asked in an evaluation."""
    for attempt in range(_PATIENCE):
        problem = family(task).problem(seed, index * _PATIENCE + attempt)
        if is_for_validation(problem, held_out_share):
            return problem
    raise UserError(f"held_out_share: {held_out_share} leaves nothing of '{task}' for validation; use a smaller share")


def evaluation_problems(task: str, n: int, seed: int, held_out_share: float = HELD_OUT_SHARE) -> list[Problem]:
    """`n` held-out problems of a family, or all of them where it has fewer; no two have the same content. None at all is a `UserError`."""
    found: dict[str, Problem] = {}
    draws, since_new = 0, 0
    while len(found) < n and since_new < _PATIENCE:
        problem = family(task).problem(seed, draws)
        draws, since_new = draws + 1, since_new + 1
        if is_held_out(problem, held_out_share) and problem.content not in found:
            found[problem.content], since_new = problem, 0
    if not found:
        raise UserError(f"held_out_share: {held_out_share} holds out no problem of '{task}'; use a larger share")
    return list(found.values())


def constant_baseline(problems: Sequence[Problem]) -> float:
    """The accuracy that the best constant answer reaches on these problems: the share of their most frequent answer."""
    return max(Counter(problem.answer for problem in problems).values()) / len(problems)
