"""Progress on stderr for anything that takes over two seconds: what, how far, how fast, time left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True, highlight=False)
FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 30.0  # where there is no terminal, a plain line now and then instead of a bar


class Bar:
    """One progress line. `advance` moves it; `note` replaces the text at its end (rate, loss, ...)."""

    def __init__(self, what: str, total: float | None, done: int, progress: Progress, task: TaskID) -> None:
        self._what, self._total, self._start, self._done = what, total, done, float(done)
        self._progress, self._task, self._note = progress, task, ""
        self._started = time.monotonic()
        self._next_line = self._started + FIRST_LINE_SECONDS

    def advance(self, amount: float = 1) -> None:
        self._done += amount
        self._progress.advance(self._task, amount)
        if not console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            say(self._line())

    def note(self, text: str) -> None:
        self._note = text
        self._progress.update(self._task, note=text)

    def _line(self) -> str:
        rate = (self._done - self._start) / max(1e-9, time.monotonic() - self._started)
        of = f" of {self._total:,.0f}" if self._total else ""
        left = f", about {(self._total - self._done) / rate / 60:.1f} min left" if self._total and rate > 0 else ""
        return f"{self._what}: {self._done:,.0f}{of}, {rate:,.1f}/s{left}  {self._note}".rstrip()


@contextmanager
def bar(what: str, total: float | None, done: int = 0) -> Iterator[Bar]:
    """A progress line named `what` that runs to `total`; `done` is where a resumed job starts."""
    columns = [
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, completed=done, note="")
        yield Bar(what, total, done, progress, task)


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """Iterate `items` under a progress line."""
    with bar(what, total) as line:
        for item in items:
            yield item
            line.advance()


def say(text: str) -> None:
    """One line for the user, on stderr."""
    console.print(text, markup=False, soft_wrap=True)
