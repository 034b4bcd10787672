"""The text of an answer ends before the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class AnswerText:
    """Text of a growing answer. What may be the beginning of a stop string is held back; `stopped` once one is found, and nothing of it or
    after it is ever given. An answer ends as soon as a stop string stands at its end, before the longest that does."""

    def __init__(self, stop_strings: Sequence[str] = ()) -> None:
        self.stop_strings = tuple(stop for stop in stop_strings if stop)
        self.held = ""
        self.stopped = False

    def finish(self) -> str:
        """What is left when no more comes."""
        text, self.held = self.held, ""
        return text

    def take(self, text: str) -> str:
        """What became certain with more text; may be empty."""
        if self.stopped or not self.stop_strings:
            return "" if self.stopped else text
        self.held += text
        for end in range(len(self.held) - len(text) + 1, len(self.held) + 1):  # as if it came letter by letter
            starts = [end - len(stop) for stop in self.stop_strings if self.held.endswith(stop, 0, end)]
            if starts:
                certain, self.held, self.stopped = self.held[:min(starts)], "", True
                return certain
        keep = max(partial_ending(self.held, stop) for stop in self.stop_strings)
        certain, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return certain


def partial_ending(text: str, wanted: str) -> int:
    """How many characters at the end of `text` may be the beginning of `wanted`."""
    return next((n for n in range(min(len(wanted) - 1, len(text)), 0, -1) if wanted.startswith(text[-n:])), 0)
