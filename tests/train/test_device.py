"""The device of a training run, as far as a machine without a GPU can tell."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparseling import runner
from sparseling.errors import UserError
from sparseling.recipe import load_recipe
from sparseling.runner import machine_of, refuse_too_large
from sparseling.train import device
from sparseling.train.device import memory_bytes, one_order_of_adding, training_device

RECIPE = Path(__file__).parents[2] / "recipes" / "laptop.yaml"


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_device("cpu") == "cpu"
    with pytest.raises(UserError, match="device: this machine has no CUDA device that torch can use; set it to cpu"):
        training_device("cuda")


def test_a_gpu_that_is_too_old_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match="device: Tesla T4 is too old"):
        training_device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert training_device("cuda") == "cuda"


def test_a_model_that_does_not_fit_the_gpu_may_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1 << 20))
    assert memory_bytes("cuda") == 1 << 20 < memory_bytes("cpu")
    refuse_too_large(load_recipe(RECIPE), "cpu")
    with pytest.raises(UserError, match="to train on one GPU, this one has 0 GiB; choose a smaller model, or device: cpu"):
        refuse_too_large(load_recipe(RECIPE), "cuda")


def test_one_order_of_adding_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with one_order_of_adding("cpu"):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), one_order_of_adding("cuda"):
        assert torch.are_deterministic_algorithms_enabled() and device.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def machine_after(began: dict[str, Any] | None, folder: Path, on: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `machine_of` makes of an earlier machine.json."""
    monkeypatch.setattr("sparseling.train.peak.matmul_peak", lambda dtype, device, seconds: 5e9)
    monkeypatch.setattr(runner, "describe", lambda device: f"kernels of {device}")
    if began is not None:
        (folder / "machine.json").write_text(json.dumps(began))
    return machine_of(folder, load_recipe(RECIPE), on)


def test_what_a_run_began_with_stays_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = machine_after(None, tmp_path, "cpu", monkeypatch)
    assert new["device"] == "cpu" and new["kernels"] == "kernels of cpu" and new["matmul_peak_flops"] == 5e9
    old = {key: value for key, value in new.items() if key != "device"} | {"precision": "bf16", "matmul_peak_flops": 7}
    assert machine_after(old, tmp_path, "cpu", monkeypatch) == old  # as an older version left it
    moved = machine_after(old, tmp_path, "cuda", monkeypatch)
    assert moved["device"] == "cuda" and moved["precision"] == "bf16" and moved["kernels"] == "kernels of cpu"
    assert moved["matmul_peak_flops"] == 5e9 and json.loads((tmp_path / "machine.json").read_text()) == moved
