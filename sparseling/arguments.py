"""Types of command-line arguments, for argparse."""

from __future__ import annotations

import argparse


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number, 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def positives(text: str) -> list[int]:
    """Whole numbers of 1 or more with commas between, at least one."""
    return [positive(part.strip()) for part in text.split(",")]


def port(text: str) -> int:
    """The number of a TCP port; 0 means any free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"'{text}' is not a port from 0 to 65535")
    return int(text)


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def names(text: str) -> list[str]:
    """Names with commas between."""
    return [name.strip() for name in text.split(",") if name.strip()]


def rates(text: str) -> list[float]:
    """Numbers above 0 with commas between, at least one."""
    return [above_zero(part.strip()) for part in text.split(",")]


def sizes(text: str) -> list[tuple[int, int]]:
    """Pairs such as `128x4` with commas between, at least one."""
    pairs = []
    for part in text.split(","):
        numbers = part.strip().split("x")
        if len(numbers) != 2:
            raise argparse.ArgumentTypeError(f"'{part.strip()}' is not a size such as 128x4")
        pairs.append((positive(numbers[0]), positive(numbers[1])))
    return pairs
