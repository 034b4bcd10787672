"""Training state: exact, hashed, atomic; a damaged newest checkpoint is passed over with a warning."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from sparseling.checkpoint.state import list_checkpoints, load_checkpoint, newest_good_checkpoint, save_checkpoint
from sparseling.errors import UserError


def tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model": {"a.weight": torch.randn(5, 3, generator=g), "bias": torch.randn(7, generator=g)},
        "optimizer": {"a.weight.step": torch.tensor(float(seed)), "a.weight.exp_avg": torch.randn(5, 3, generator=g).bfloat16()},
    }


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[g][n], b[g][n]) for g in a for n in a[g])


def test_round_trip_is_exact_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, tensors(step), {"step": step, "losses": [0.1, 1 / 3]}, keep=2)
    assert [c.step for c in list_checkpoints(tmp_path)] == [2, 10]
    got = tensors(0)
    assert load_checkpoint(newest_good_checkpoint(tmp_path), got) == {"step": 10, "losses": [0.1, 1 / 3]}
    assert equal(got, tensors(10))


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_newest_checkpoint_is_detected_and_the_previous_one_used(
    tmp_path: Path, harm: str, capsys: pytest.CaptureFixture
) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {"step": 1})
    newest = save_checkpoint(tmp_path, 2, tensors(2), {"step": 2})
    victim = max((newest / "tensors").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif harm == "truncate":
        victim.write_bytes(data[:-1])
    elif harm == "delete":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    good = newest_good_checkpoint(tmp_path)
    assert good.step == 1
    assert "damaged" in capsys.readouterr().err
    got = tensors(0)
    load_checkpoint(good, got)
    assert equal(got, tensors(1))


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, 1, tensors(1), {}) / "trainer.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        newest_good_checkpoint(tmp_path)


def test_a_half_written_checkpoint_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {"step": 1})
    (tmp_path / ".step-00000002.tmp" / "tensors").mkdir(parents=True)  # what a kill in the middle leaves
    assert newest_good_checkpoint(tmp_path).step == 1

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileSystem, "create_stream", full)  # below DCP, which wraps the error in one of its own
    with pytest.raises(UserError, match="disk is full"):
        save_checkpoint(tmp_path, 2, tensors(2), {})
    assert [c.step for c in list_checkpoints(tmp_path)] == [1] and newest_good_checkpoint(tmp_path).step == 1


def test_another_model_is_named_as_the_reason(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, tensors(1), {})
    other = tensors(1)
    other["model"]["new.weight"] = torch.zeros(2)
    with pytest.raises(UserError, match="does not fit this model"):
        load_checkpoint(newest_good_checkpoint(tmp_path), other)


def test_nothing_to_resume_is_none(tmp_path: Path) -> None:
    assert newest_good_checkpoint(tmp_path / "not there") is None
