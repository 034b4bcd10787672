"""Word problems: a short story, with one gain, or with one step up and one down."""

from __future__ import annotations

import random

from .arithmetic import addition_steps, subtraction_steps
from .problem import Problem

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Lena", "Paul", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stones")
GAINS = ("{name} finds {n} more", "{name} buys {n} more", "{name} gets {n} more")
LOSSES = ("{name} gives away {n}", "{name} loses {n}", "{name} sells {n}")
STORIES = (
    "{name} has {a} {things}. {first}. Then {second}. How many {things} does {name} have now?",
    "{name} has {a} {things}. {first} and {second}. How many {things} are left?",
    "There are {a} {things} with {name}. {first}, then {second}. How many {things} are there now?",
)
SUMS = (
    "{name} has {a} {things} and gets {b} more. How many in all?", "{name} finds {a} {things} and then {b} more. How many in all?",
    "There are {a} {things} here and {b} there. How many in all?",
)


def gain_problem(rng: random.Random) -> Problem:
    """A story about the sum of two numbers from 10 to 99. Its content is that of the sum: one is held out where the other is."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    prompt = rng.choice(SUMS).format(name=rng.choice(NAMES), things=rng.choice(THINGS), a=a, b=b)
    return Problem("gain_problem", prompt, addition_steps(a, b), str(a + b), f"{min(a, b)}+{max(a, b)}")


def word_problem(rng: random.Random) -> Problem:
    """Someone has a number of things from 10 to 89 and gains and loses 2 to 9 of them, in either order."""
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    a, gain, loss = rng.randint(10, 89), rng.randint(2, 9), rng.randint(2, 9)
    up, down = rng.choice(GAINS).format(name=name, n=gain), rng.choice(LOSSES).format(name=name, n=loss)
    gains_first = rng.random() < 0.5
    first, second = (up, down) if gains_first else (down, up)
    if gains_first:
        steps = addition_steps(a, gain) + subtraction_steps(a + gain, loss)
    else:
        steps = subtraction_steps(a, loss) + addition_steps(a - loss, gain)
    prompt = rng.choice(STORIES).format(name=name, things=things, a=a, first=first, second=second)
    return Problem("word_problem", prompt, steps, str(a + gain - loss), f"{a}+{gain}-{loss}")
