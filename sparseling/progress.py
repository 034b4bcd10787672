"""Progress on stderr for anything that takes over two seconds: what, how far, how fast, time left."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True, highlight=False)


class Bar:
    """One progress line. `advance` moves it; `note` replaces the text at its end (rate, loss, ...)."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        self._progress.advance(self._task, amount)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


@contextmanager
def bar(what: str, total: float | None, done: int = 0) -> Iterator[Bar]:
    """A progress line named `what` that runs to `total`; `done` is where a resumed job starts."""
    columns = [
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console, refresh_per_second=2, transient=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total, completed=done, note="")
        yield Bar(progress, task)


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """Iterate `items` under a progress line."""
    with bar(what, total) as line:
        for item in items:
            yield item
            line.advance()


def say(text: str) -> None:
    """One line for the user, on stderr."""
    console.print(text, markup=False, soft_wrap=True)
