"""Lists of numbers and letters: the largest, sorting, reversing, counting. Letters are written with spaces: one token each."""

from __future__ import annotations

import random
import string

from .problem import Problem

MAXIMUM_PROMPTS = (
    "Which number is the largest: {shown}?", "Find the maximum of {shown}.", "What is the biggest of {shown}?",
    "Give the greatest number: {shown}.",
)
SORT_NUMBERS_PROMPTS = (
    "Sort the numbers {shown}.", "Put in ascending order: {shown}.", "Order from small to large: {shown}.", "Arrange the numbers {shown}.",
)
SORT_LETTERS_PROMPTS = (
    "Sort the letters {shown}.", "Put in alphabetical order: {shown}.", "Order from a to z: {shown}.", "Arrange the letters {shown}.",
)
REVERSE_PROMPTS = (
    "Reverse the letters {shown}.", "Write backwards: {shown}.", "Spell from the end: {shown}.", "Turn around the letters {shown}.",
)
COUNT_PROMPTS = (
    "How many times is {letter} among {shown}?", "Count the letter {letter} in {shown}.", "How often does {letter} occur in {shown}?",
)


def maximum(rng: random.Random) -> Problem:
    """The largest of three different numbers from 10 to 99, found by comparing along the list."""
    numbers = rng.sample(range(10, 100), 3)
    best, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{best} {number} max {max(best, number)}")
        best = max(best, number)
    prompt = rng.choice(MAXIMUM_PROMPTS).format(shown=", ".join(map(str, numbers)))
    return Problem("maximum", prompt, tuple(steps), str(best), " ".join(map(str, sorted(numbers))))


def sort_numbers(rng: random.Random) -> Problem:
    """Three or four different numbers from 10 to 99 in ascending order."""
    numbers = [str(number) for number in rng.sample(range(10, 100), rng.randint(3, 4))]
    prompt = rng.choice(SORT_NUMBERS_PROMPTS).format(shown=" ".join(numbers))
    return Problem("sort_numbers", prompt, _selection_steps(numbers, "min"), " ".join(sorted(numbers)), " ".join(sorted(numbers)))


def sort_letters(rng: random.Random) -> Problem:
    """Three different letters in alphabetical order."""
    letters = rng.sample(string.ascii_lowercase, 3)
    prompt = rng.choice(SORT_LETTERS_PROMPTS).format(shown=" ".join(letters))
    return Problem("sort_letters", prompt, _selection_steps(letters, "first"), " ".join(sorted(letters)), " ".join(sorted(letters)))


def _selection_steps(items: list[str], word: str) -> tuple[str, ...]:
    """Selection sort: each line takes the smallest item and copies the rest in their order."""
    steps, rest = ["all " + " ".join(items)], list(items)
    while rest:
        smallest = min(rest)
        rest.remove(smallest)
        steps.append(f"{word} {smallest}" + (" rest " + " ".join(rest) if rest else ""))
    return tuple(steps)


def reverse_letters(rng: random.Random) -> Problem:
    """Four different letters backwards: numbered first, then read by falling number."""
    letters = rng.sample(string.ascii_lowercase, 4)
    numbered = [f"{place} {letter}" for place, letter in enumerate(letters, start=1)]
    prompt = rng.choice(REVERSE_PROMPTS).format(shown=" ".join(letters))
    content = min(" ".join(letters), " ".join(letters[::-1]))
    return Problem("reverse_letters", prompt, (" ".join(numbered), " ".join(numbered[::-1])), " ".join(letters[::-1]), content)


def count_letter(rng: random.Random) -> Problem:
    """How often a letter occurs among five to eight letters of a small alphabet."""
    alphabet = rng.sample(string.ascii_lowercase, 3)
    letters = rng.choices(alphabet, k=rng.randint(5, 8))
    letter, count, walk = alphabet[0], 0, []
    for item in letters:
        count += item == letter
        walk.append(f"{item} {count}")
    prompt = rng.choice(COUNT_PROMPTS).format(letter=letter, shown=" ".join(letters))
    steps = (f"count {letter}", "walk " + " ".join(walk))
    return Problem("count_letter", prompt, steps, str(count), f"{letter} in {' '.join(letters)}")
