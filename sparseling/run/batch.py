"""The parts of a step: which rows belong to which job, and what can be read off them besides logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .engine import StepOutput
from .job import Job, RoutingRows


@dataclass(eq=False)
class Portion:
    """`count` tokens of a job from position `start` on, in the rows from `row` on; the last `drafts` are guesses, of which `accepted`
    turned out right. `logits`: the row of its first logits; a part that does not reach the end of its job's text has none."""

    job: Job
    count: int
    drafts: int = 0
    start: int = 0
    row: int = 0
    logits: int = 0
    accepted: int = 0

    @property
    def answers(self) -> bool:
        """Whether it reaches the end of its job's text as it is before the step."""
        return self.start + self.count - self.drafts == len(self.job.ids)


@dataclass(frozen=True)
class Batch:
    """The arrays of `Engine.step`."""

    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    tables: Tensor
    wanted: Tensor


def batch_of(parts: Sequence[Portion]) -> Batch:
    """Lay the parts out one after the other; they learn their places."""
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[int] = []
    wanted: list[int] = []
    for number, part in enumerate(parts):
        job = part.job
        part.start, part.row, part.logits = job.computed, len(tokens), len(wanted)
        end = part.start + part.count
        tokens += job.ids[part.start:end]
        tokens += job.drafts[:part.drafts]
        positions += range(part.start, end)
        sequences += [number] * part.count
        if part.answers:
            wanted += range(len(tokens) - part.drafts - 1, len(tokens))
    tables = np.full((len(parts), max(len(part.job.pages) for part in parts)), -1, dtype=np.int32)  # -1: no page
    for number, part in enumerate(parts):
        tables[number, :len(part.job.pages)] = part.job.pages
    return Batch(integers(tokens), integers(positions), integers(sequences), torch.from_numpy(tables), integers(wanted))


def integers(values: Sequence[int]) -> Tensor:
    """int64; by NumPy, which is faster than `torch.tensor` where a step takes little longer."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def add_hidden(part: Portion, out: StepOutput) -> None:
    """Add the hidden states of an embedding's part to its sum: one by one, for the sum must not depend on how the prompt was cut."""
    if part.job.hidden_sum is not None and out.hidden is not None:
        for hidden in out.hidden[part.row:part.row + part.count].numpy():
            part.job.hidden_sum += hidden


def routing_rows(part: Portion, out: StepOutput) -> RoutingRows | None:
    """The routing, not yet reported, of what the job has computed by now; None for nothing or a job that does not show it."""
    job = part.job
    first = max(job.routed, part.start)
    if job.routing == "nothing" or first >= job.computed or out.expert_scores is None:
        return None
    new = slice(part.row + first - part.start, part.row + job.computed - part.start)
    job.routed = job.computed
    return RoutingRows(first, *(np.ascontiguousarray(values.numpy()[:, new].swapaxes(0, 1))
                                for values in (out.expert_ids, out.expert_weights, out.expert_scores) if values is not None))


def expert_counts(parts: Sequence[Portion], out: StepOutput, experts: int) -> tuple[np.ndarray, int]:
    """How often each expert was used [layers, experts] by the tokens that stay, and how many these are."""
    assert out.expert_ids is not None
    ids = out.expert_ids.numpy()
    if any(part.accepted < part.drafts for part in parts):
        rows = [row for part in parts for row in range(part.row, part.row + part.count - part.drafts + part.accepted)]
        ids = ids[:, rows]
    return np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in ids]), ids.shape[1]
