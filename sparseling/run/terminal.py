"""Where a chat is shown: answers on `out`, reasoning and notes dimmed."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from typing import Literal, TextIO

from .thinking import CLOSE, OPEN, Piece

PROMPT = "> "
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model may say anything, also control characters that would move the cursor or recolour the screen.
CONTROL = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)])
del CONTROL[ord("\n")], CONTROL[ord("\t")]


class Terminal:
    """`interactive`: a person types and reads here, and reasoning is shown on `out` before the answer. Otherwise `out` has nothing but
    answers, and reasoning goes to `err` if that is a screen."""

    def __init__(self, out: TextIO, err: TextIO, interactive: bool) -> None:
        for text_stream in (out, err):
            if isinstance(text_stream, io.TextIOWrapper):
                text_stream.reconfigure(errors="replace")                        # a screen that lacks a character shows '?'
        self.out, self.err, self.interactive = out, err, interactive
        self._thoughts = out if interactive else err if err.isatty() else None
        self._showing: Literal["thought", "answer"] | None = None

    def note(self, text: str) -> None:
        """A line that is not part of any answer."""
        write(self.err, dim(text, self.err) + "\n")

    def show(self, pieces: Iterable[Piece]) -> None:
        """Pieces of a response as they come."""
        for kind, text in pieces:
            if kind != self._showing:
                self._change_to(kind)
            if kind == "answer":
                write(self.out, harmless(text, self.out))
            elif self._thoughts is not None:
                write(self._thoughts, dim(harmless(text, self._thoughts), self._thoughts))

    def end_response(self) -> None:
        """Finish the line of the response that was shown."""
        self._change_to(None)
        write(self.out, "\n")

    def ask(self, source: TextIO) -> str:
        """One line from the user. Raises EOFError at the end of the input."""
        if source is sys.stdin and self.out is sys.stdout:
            return input(PROMPT)
        write(self.out, PROMPT)
        line = source.readline()
        if not line:
            raise EOFError
        return line

    def _change_to(self, kind: Literal["thought", "answer"] | None) -> None:
        """Set a thought off from what follows it: by being dim, or by its tags where nothing can be dim."""
        thoughts, tags = self._thoughts, self._thoughts is not None and not can_dim(self._thoughts)
        if thoughts is not None and kind == "thought" and tags:
            write(thoughts, OPEN + "\n")
        if thoughts is not None and self._showing == "thought":
            write(thoughts, (f"\n{CLOSE}" if tags else "") + ("\n\n" if kind else "\n" if thoughts is not self.out else ""))
        self._showing = kind


def write(target: TextIO, text: str) -> None:
    """Write at once."""
    target.write(text)
    target.flush()


def harmless(text: str, target: TextIO) -> str:
    """`text` without control characters where `target` is a screen."""
    return text.translate(CONTROL) if target.isatty() else text


def can_dim(target: TextIO) -> bool:
    """Whether `target` is a screen that shows dim text and the user wants it."""
    return target.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def dim(text: str, target: TextIO) -> str:
    """`text` dimmed where that can be."""
    return f"{DIM}{text}{PLAIN}" if can_dim(target) else text
