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
    """"did you mean 'x'?" for the closest of `known`, by its last part when names are dotted; the list of all when nothing is close."""
    names = sorted(known)
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(names)} | {name: name for name in names}
    hits = difflib.get_close_matches(word, by_last_part, n=1, cutoff=0.6)
    if hits:
        return f"did you mean '{by_last_part[hits[0]]}'?"
    likest = difflib.get_close_matches(word, names, n=1, cutoff=0.0)
    return f"the nearest is '{likest[0]}' of: {', '.join(names)}" if likest else "there is none"
