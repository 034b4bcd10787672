"""The loop itself: a spike's batch comes back once and slowly, also over a restart; a stop is obeyed at any step; a lost end is named."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from sparseling.accounting import training_flops_per_token
from sparseling.checkpoint.state import SavedState, checkpoint_folder, list_checkpoints
from sparseling.config import preset
from sparseling.data.batches import Batch
from sparseling.errors import UserError
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.train import loop
from sparseling.train.loop import Interrupted, LoopSettings, Progress, train
from sparseling.train.metrics import read_metrics
from sparseling.train.objective import LossWeights
from sparseling.train.optimizer import AdamWSettings
from sparseling.train.spikes import SpikeRule

SEQ, SEQUENCES, STEPS = 16, 2, 12
SPIKE_AT = 3 * SEQUENCES  # the first sample of the batch that spikes
RULE = SpikeRule(window=4, delay_steps=2)


def settings(**changes: object) -> LoopSettings:
    base = {"seed": 1, "seq_length": SEQ, "step_sequences": (SEQUENCES,) * STEPS, "optimizer": AdamWSettings(1e-3), "spike_rule": RULE,
            "checkpoint_every": 2}
    return LoopSettings(**(base | changes))


def batch_at(first: int, sequences: int) -> Batch:
    generator = torch.Generator().manual_seed(first)
    ids = torch.randint(0, 512, (sequences, SEQ + 1), generator=generator)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros(sequences, SEQ, dtype=torch.int64))


def run(folder: Path, fail_at: int | None = None, **changes: object) -> tuple[LingForCausalLM, Progress, list[int]]:
    """Train; returns model, progress, and the first sample index of every step. `fail_at`: die when that step is to be run."""
    torch.set_num_threads(1)
    model, drawn = initialize(LingForCausalLM(preset("pico")), 0), []

    def batch(first: int, sequences: int) -> Batch:
        if fail_at is not None and len(drawn) == fail_at:
            raise RuntimeError("power cut")
        drawn.append(first)
        return batch_at(first, sequences)

    progress = train(model, settings(**changes), batch, folder, "test", lambda m: {}, lambda m, step: None)
    return model, progress, drawn


@pytest.fixture
def one_batch_spikes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch at `SPIKE_AT` is a spike whenever it is seen."""
    seen: dict[str, int] = {}
    choose = loop.choose_batch

    def remember(p: Progress, new_sequences: int) -> tuple[int, int, bool]:
        seen["first"], *_ = result = choose(p, new_sequences)
        return result

    monkeypatch.setattr(loop, "choose_batch", remember)
    monkeypatch.setattr(loop.spikes, "is_spike", lambda rule, state, loss, norm: seen["first"] == SPIKE_AT)


@pytest.mark.usefixtures("one_batch_spikes")
def test_a_spiking_batch_comes_back_once_and_slowly_and_no_sample_is_lost(tmp_path: Path) -> None:
    _, progress, drawn = run(tmp_path)
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    skipped, slowed = ([line["step"] for line in lines if line[key]] for key in ("skipped", "slowed"))
    assert skipped == [4] and len(slowed) == 1 and RULE.delay_steps <= slowed[0] - skipped[0] <= 2 * RULE.delay_steps
    assert lines[slowed[0] - 1]["learning_rate"] == pytest.approx(1e-3 * RULE.slow_factor)
    taken = [first for first, line in zip(drawn, lines, strict=True) if not line["skipped"]]
    assert sorted(taken) == list(range(0, (STEPS - 1) * SEQUENCES, SEQUENCES))  # every sample once; one step went to the skip
    assert progress.tokens == (STEPS - 1) * SEQUENCES * SEQ == lines[-1]["tokens"]
    assert progress.next_index == (STEPS - 1) * SEQUENCES and not progress.spikes.postponed


@pytest.mark.usefixtures("one_batch_spikes")
@pytest.mark.parametrize("dies_at", [4, 5, 6, 9])
def test_a_restart_between_skip_and_return_changes_nothing(tmp_path: Path, dies_at: int) -> None:
    whole, progress, _ = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "parts", fail_at=dies_at)
    model, again, _ = run(tmp_path / "parts")
    assert again.to_dict() == progress.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("at", [1, STEPS - 1, STEPS])
def test_a_stop_is_obeyed_also_in_the_last_step(tmp_path: Path, at: int) -> None:
    def batch(first: int, sequences: int) -> Batch:
        if first == (at - 1) * SEQUENCES:
            signal.raise_signal(signal.SIGTERM)
        return batch_at(first, sequences)

    model = initialize(LingForCausalLM(preset("pico")), 0)
    with pytest.raises(Interrupted, match=f"SIGTERM and saved at step {at} of {STEPS}"):
        train(model, settings(), batch, tmp_path, "test", lambda m: {}, lambda m, step: None)
    assert list_checkpoints(tmp_path / "checkpoints")[-1].step == at


def test_a_damaged_end_of_the_stage_before_is_an_error_not_an_older_state(tmp_path: Path) -> None:
    run(tmp_path / "first")
    last = checkpoint_folder(tmp_path / "first" / "checkpoints", STEPS)
    model = initialize(LingForCausalLM(preset("pico")), 0)
    arguments = (settings(), batch_at, tmp_path / "second", "second", lambda m: {}, lambda m, step: None)
    train(model, *arguments, continue_from=SavedState(last, STEPS))
    (last / "trainer.json").write_text("{}")
    model = initialize(LingForCausalLM(preset("pico")), 0)
    with pytest.raises(UserError, match=r"first.done\.json and run again"):
        train(model, settings(), batch_at, tmp_path / "third", "third", *arguments[4:], continue_from=SavedState(last, STEPS))


def test_steps_that_are_never_finite_end_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.spikes, "is_spike", lambda *rest: True)
    monkeypatch.setattr(loop.spikes, "judge", lambda *rest: "skip")
    with pytest.raises(UserError, match="lower the learning_rate"):
        run(tmp_path, step_sequences=(1,) * 100)


def test_a_model_without_experts_trains(tmp_path: Path) -> None:
    config = preset("pico").replace(first_k_dense_replace=2, num_nextn_predict_layers=0)
    model = initialize(LingForCausalLM(config), 0)
    progress = train(model, settings(), batch_at, tmp_path, "dense", lambda m: {}, lambda m, step: None)
    assert progress.step == STEPS


@pytest.mark.parametrize(("mtp", "layers"), [(0.1, 1), (0.0, 0)])
def test_layers_whose_loss_has_no_weight_are_not_counted_as_computed(tmp_path: Path, mtp: float, layers: int) -> None:
    run(tmp_path, loss_weights=LossWeights(mtp=mtp))
    computed = training_flops_per_token(preset("pico").replace(num_nextn_predict_layers=layers), SEQ)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        if "loss" in line:
            assert line["flops_per_second"] / line["tokens_per_second"] == pytest.approx(computed, rel=1e-3)
