"""Arithmetic with the columns written out.

Steps are made for small models: the digits that a step needs stand in the step itself, a carry is written before it is used, and
every line has its fixed place. Numbers are tokenised digit by digit.
"""

from __future__ import annotations

import random

from .problem import Problem

SUM_PROMPTS = (
    "What is {a} + {b}?", "Add {a} and {b}.", "Compute {a} + {b}.", "How much is {a} plus {b}?", "Find the sum of {a} and {b}.",
)
DIFFERENCE_PROMPTS = (
    "What is {a} - {b}?", "Subtract {b} from {a}.", "Compute {a}-{b}.", "How much is {a} minus {b}?", "Take {b} away from {a}.",
)
PRODUCT_PROMPTS = ("What is {a} * {b}?", "Multiply {a} by {b}.", "Compute {a}*{b}.", "How much is {a} times {b}?")
SEQUENCE_PROMPTS = (
    "What comes next: {shown}?", "Continue the sequence {shown}.", "Find the next number: {shown}.", "Which number follows {shown}?",
)


def addition_steps(a: int, b: int) -> tuple[str, ...]:
    """The columns of a + b for 0 <= a, b <= 99; the last line ends with everything but the ones digit."""
    ones = a % 10 + b % 10
    carry = ones // 10
    return (
        f"{a}+{b}",
        f"ones {a % 10}+{b % 10}={ones} carry {carry}",
        f"tens {a // 10}+{b // 10}+{carry}={a // 10 + b // 10 + carry}",
    )


def subtraction_steps(a: int, b: int) -> tuple[str, ...]:
    """The columns of a - b for 0 <= b <= a <= 99."""
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow
    return (
        f"{a}-{b}",
        f"ones {ones}-{b % 10}={ones - b % 10} borrow {borrow}",
        f"tens {a // 10}-{b // 10}-{borrow}={a // 10 - b // 10 - borrow}",
    )


def two_digit_addition(rng: random.Random) -> Problem:
    """The sum of two numbers from 10 to 99."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    prompt = rng.choice(SUM_PROMPTS).format(a=a, b=b)
    return Problem("two_digit_addition", prompt, addition_steps(a, b), str(a + b), f"{min(a, b)}+{max(a, b)}")


def two_digit_subtraction(rng: random.Random) -> Problem:
    """The difference of two numbers from 10 to 99, never negative."""
    b, a = sorted((rng.randint(10, 99), rng.randint(10, 99)))
    prompt = rng.choice(DIFFERENCE_PROMPTS).format(a=a, b=b)
    return Problem("two_digit_subtraction", prompt, subtraction_steps(a, b), str(a - b), f"{a}-{b}")


def three_digit_subtraction(rng: random.Random) -> Problem:
    """The difference of two numbers from 100 to 999, never negative."""
    b, a = sorted((rng.randint(100, 999), rng.randint(100, 999)))
    steps, borrow = [f"{a}-{b}"], 0
    for name, unit in (("ones", 1), ("tens", 10), ("hundreds", 100)):
        minus = f"-{borrow}" if unit > 1 else ""
        top, bottom = a // unit % 10, b // unit % 10 + borrow
        borrow = int(top < bottom)
        top += 10 * borrow
        steps.append(f"{name} {top}-{b // unit % 10}{minus}={top - bottom}" + (f" borrow {borrow}" if unit < 100 else ""))
    prompt = rng.choice(DIFFERENCE_PROMPTS).format(a=a, b=b)
    return Problem("three_digit_subtraction", prompt, tuple(steps), str(a - b), f"{a}-{b}")


def multiplication(rng: random.Random) -> Problem:
    """A number from 10 to 99 times a digit from 2 to 9."""
    a, b = rng.randint(10, 99), rng.randint(2, 9)
    ones, tens = a % 10 * b, a // 10 * b
    carry = ones // 10
    steps = (f"{a}*{b}", f"ones {a % 10}*{b}={ones} carry {carry}", f"tens {a // 10}*{b}={tens} {tens}+{carry}={tens + carry}")
    prompt = rng.choice(PRODUCT_PROMPTS).format(a=a, b=b)
    return Problem("multiplication", prompt, steps, str(a * b), f"{a}*{b}")


def sequence(rng: random.Random) -> Problem:
    """The next number of a sequence of four that grows by a fixed step from 2 to 9."""
    step = rng.randint(2, 9)
    start = rng.randint(10, 99 - 3 * step)
    shown = [start + i * step for i in range(4)]
    steps = (f"{shown[0]} to {shown[1]} is {step}", *addition_steps(shown[3], step))
    prompt = rng.choice(SEQUENCE_PROMPTS).format(shown=", ".join(map(str, shown)))
    return Problem("sequence", prompt, steps, str(shown[3] + step), f"{start} by {step}")
