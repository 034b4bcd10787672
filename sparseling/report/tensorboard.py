"""The metrics of metrics.jsonl as TensorBoard events, under the same names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter


class Events:
    """Writes one run's events into a folder.

    `resume_step` is the last step of the checkpoint that training goes on from: events of later steps, written before the restart, are
    superseded (TensorBoard hides them). None starts afresh. Every writer has a file of its own, so nothing is overwritten.
    """

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The file's name ends in a count: two restarts within a second would otherwise share one, and the second truncate it.
        session = len(list(folder.glob("events.out.tfevents.*")))
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=f".{session:04d}")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics at `step`. Names as in the JSON line: a list becomes `name/layer_03`, a mapping `name/key`.

        A list of lists (expert_load) becomes one histogram a layer. Texts and the step itself are left out.
        """
        for name, value in _scalars(metrics):
            self._writer.add_scalar(name, value, step)
        for name, values in _histograms(metrics):
            self._writer.add_histogram(name, values, step)

    def flush(self) -> None:
        """Hand all events to the file system."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The single figures of a metrics line with their event names."""
    for name, value in metrics.items():
        if name == "step":
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", float(item)) for key, item in value.items() if isinstance(item, int | float))
        elif isinstance(value, list | tuple):
            yield from ((f"{name}/layer_{layer:02d}", float(item)) for layer, item in enumerate(value) if isinstance(item, int | float))
        elif isinstance(value, int | float):
            yield name, float(value)


def _histograms(metrics: Mapping[str, Any]) -> Iterator[tuple[str, list[float]]]:
    for name, value in metrics.items():
        for layer, row in enumerate(value if isinstance(value, list | tuple) else ()):
            finite = [float(item) for item in row if math.isfinite(item)] if isinstance(row, list | tuple) else []
            if finite:
                yield f"{name}/layer_{layer:02d}", finite
