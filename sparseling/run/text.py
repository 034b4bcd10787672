"""From the tokens of an answer to its text, which ends before the first of its stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.tokenizer import StreamDecoder, Tokenizer


class AnswerText:
    """Text of a growing answer. What may be the beginning of a stop string is held back; `stopped` once one is found, and nothing of it or
    after it is ever given. An answer ends where the earliest of its stop strings begins, the longest way back where two end at once."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self.decoder = StreamDecoder(tokenizer)
        self.stop_strings = tuple(stop for stop in stop_strings if stop)
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""
        return self.take(self.decoder.push(token))

    def finish(self) -> str:
        """What is left when no more comes."""
        text = self.take(self.decoder.finish()) + self.held
        self.held = ""
        return text

    def take(self, text: str) -> str:
        """More decoded text."""
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
