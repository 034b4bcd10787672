"""Reasoning and answer told apart while the text still comes in."""

from __future__ import annotations

from typing import Literal, NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Piece(NamedTuple):
    """Text that is certainly thought, or certainly answer."""

    kind: Literal["thought", "answer"]
    text: str


class ThinkingSplitter:
    """Splits a growing response as `align.chat.parse_response` splits a finished one.

    A response that begins with `<think>` is thought up to `</think>`, without the line breaks around; all else is answer. What may be
    part of a tag, or a line break at the end of the thought, is held back until more comes.
    """

    def __init__(self) -> None:
        self._state: Literal["start", "thought", "gap", "answer"] = "start"
        self._held = ""
        self._thought_shown = False

    @property
    def state(self) -> Literal["start", "thought", "gap", "answer"]:
        """Where the text stands: "start" while it may become either, "gap" right after a thought."""
        return self._state

    def push(self, text: str) -> list[Piece]:
        """What became certain with `text`, in order."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            beginning = self._held.lstrip()
            if beginning.startswith(OPEN):
                self._state, self._held = "thought", beginning.removeprefix(OPEN)
            elif not OPEN.startswith(beginning):
                self._state = "answer"
        if self._state == "thought":
            pieces += self._thought()
        if self._state == "gap":
            self._held = self._held.lstrip("\n")
            self._state = "answer" if self._held else "gap"
        if self._state == "answer" and self._held:
            pieces.append(Piece("answer", self._held))
            self._held = ""
        return pieces

    def finish(self) -> list[Piece]:
        """What is left when no more comes."""
        kind: Literal["thought", "answer"] = "thought" if self._state == "thought" else "answer"
        text = self._held
        if kind == "thought":
            text = text.rstrip("\n") if self._thought_shown else text.strip("\n")
        self._held = ""
        return [Piece(kind, text)] if text else []

    def _thought(self) -> list[Piece]:
        if not self._thought_shown:
            self._held = self._held.lstrip("\n")
        text, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._state, self._held, text = "gap", rest, text.rstrip("\n")
        else:
            certain = len(text) - _partial_tag(text)
            certain = len(text[:certain].rstrip("\n"))
            text, self._held = text[:certain], text[certain:]
        self._thought_shown = self._thought_shown or bool(text)
        return [Piece("thought", text)] if text else []


def _partial_tag(text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `</think>`."""
    return next((n for n in range(min(len(CLOSE) - 1, len(text)), 0, -1) if CLOSE.startswith(text[-n:])), 0)
