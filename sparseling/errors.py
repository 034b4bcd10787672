"""The one exception that means "the user can mend this"."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: one sentence that names the file or key, what is wrong, and the mend.

    The command line prints it without a traceback and exits with 1 (with 2 for `UsageError`).
    """


class UsageError(UserError):
    """Wrong arguments or a wrong recipe: exit code 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `known`, or the sorted list of all when nothing is close."""
    names = sorted(known)
    hits = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{hits[0]}'?" if hits else "known: " + ", ".join(names)
