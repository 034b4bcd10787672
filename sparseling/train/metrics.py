"""One line a step: `metrics.jsonl` and TensorBoard events under the same names; a resumed stage continues both without doubles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import disk_full, write_aside
from ..report.tensorboard import Events


class MetricsLog:
    """Writes metrics of one stage; `write` is durable line by line."""

    def __init__(self, folder: Path, events: Events) -> None:
        self._stream = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._events = events

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append the metrics of `step`. Raises `UserError` when the disk is full."""
        try:
            self._stream.write(json.dumps({"step": step} | metrics) + "\n")
            self._stream.flush()
            self._events.write(step, {k: v for k, v in metrics.items() if k != "expert_load"})
        except OSError as error:
            raise disk_full(error, Path(self._stream.name)) or error from None

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._events.close()


@contextmanager
def open_metrics(folder: Path, from_step: int) -> Iterator[MetricsLog]:
    """The log of a stage that goes on after `from_step`: later lines (of a run that was cut off) are dropped first."""
    keep_lines_up_to(folder / "metrics.jsonl", from_step)
    log = MetricsLog(folder, Events(folder / "events", from_step))
    try:
        yield log
    finally:
        log.close()


def keep_lines_up_to(path: Path, step: int) -> None:
    """Drop lines after `step`, and a last line that was cut off in the middle."""
    lines = read_metrics(path)
    if not path.exists():
        return
    with write_aside(path) as stream:
        for line in lines:
            if line["step"] <= step:
                stream.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; [] when there is none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
