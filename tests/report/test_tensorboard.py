"""Events on disk: names, values, and what a resumed run supersedes; read back with the event records' own framing."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sparseling.report.tensorboard import Events


def records(folder: Path) -> list[Any]:
    """All events of a folder in the order in which TensorBoard reads them: a record is length, checksum, bytes, checksum."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def visible(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars by name and step as TensorBoard shows them: a START session hides earlier events from its step on."""
    shown: dict[str, dict[int, float]] = {}
    for event in records(folder):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            shown = {name: {step: value for step, value in points.items() if step < event.step} for name, points in shown.items()}
        for value in event.summary.value:
            if value.HasField("simple_value"):
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def test_names_and_values_are_those_of_the_json_lines(tmp_path: Path) -> None:
    with Events(tmp_path / "events") as events:
        events.write(7, {
            "step": 7, "loss": 2.5, "skipped": True, "max_violation": [0.25, 0.5, None], "note": "text", "nothing": None,
            "validation_bits_per_byte": {"prose": 2.0}, "expert_load": [[0.25, 0.75], [0.5, 0.5]],
        })
    assert visible(tmp_path / "events") == {
        "loss": {7: 2.5}, "skipped": {7: 1.0}, "max_violation/layer_00": {7: 0.25}, "max_violation/layer_01": {7: 0.5},
        "validation_bits_per_byte/prose": {7: 2.0},
    }
    values = [value for event in records(tmp_path / "events") for value in event.summary.value]
    histograms = {value.tag: value.histo for value in values if value.HasField("histo")}
    assert set(histograms) == {"expert_load/layer_00", "expert_load/layer_01"}
    assert histograms["expert_load/layer_00"].num == 2 and histograms["expert_load/layer_00"].max == 0.75


def test_resuming_supersedes_later_steps_and_loses_nothing_before(tmp_path: Path) -> None:
    with Events(tmp_path) as events:
        for step in range(1, 11):
            events.write(step, {"loss": 10.0 - step})
    # At once, as after a crash in the first second: the first file must survive.
    with Events(tmp_path, resume_step=6) as events:
        for step in range(7, 9):
            events.write(step, {"loss": 100.0 + step})
    with Events(tmp_path, resume_step=7) as events:
        events.write(8, {"loss": 200.0})
    assert len(list(tmp_path.iterdir())) == 3
    assert visible(tmp_path) == {"loss": {**{step: 10.0 - step for step in range(1, 7)}, 7: 107.0, 8: 200.0}}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_do_not_stop_a_run(tmp_path: Path, value: float) -> None:
    with Events(tmp_path) as events:
        events.write(1, {"loss": value, "expert_load": [[value, value], [0.5, value]]})
        events.flush()
    assert not math.isfinite(visible(tmp_path)["loss"][1])
