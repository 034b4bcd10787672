"""The protocol with the peer process, against a made worker; and llama.cpp itself where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparseling.bench.llama import LlamaPeer
from sparseling.bench.same_tokens import where_they_part
from sparseling.checkpoint.gguf import export_model
from sparseling.config import preset
from sparseling.errors import UserError
from sparseling.model.transformer import LingForCausalLM, initialize
from sparseling.run.generate import generate

FAKE = """
import json, sys, os
threads = int(sys.argv[2])
if "refuse" in sys.argv[1]:
    print(json.dumps({"error": "RuntimeError: cannot load"}), flush=True); sys.exit()
if "dies" in sys.argv[1]:
    sys.exit("first line\\nno such library")
print("x" * 200_000, file=sys.stderr)  # more than a pipe holds
print(json.dumps({"ready": True, "version": "1", "system": "none"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    with open(sys.argv[1], "a") as log:
        log.write(line)
    if request["do"] == "decode" and request["batch"] == 13:
        print(json.dumps({"error": "RuntimeError: unlucky"}), flush=True)
    elif request["do"] == "decode" and request["batch"] == 14:
        os._exit(3)
    elif request["do"] == "decode" and request["batch"] == 15:
        print("not json", flush=True)
    elif request["do"] in ("decode", "prefill"):
        seconds = (0.2 if request["flash"] else 0.1) * (1 if request["unified"] else 0.5)
        print(json.dumps({"seconds": [seconds, 9.0, 0.0001, seconds, seconds]}), flush=True)
    else:
        print(json.dumps({"tokens": request}), flush=True)
"""
LLAMA_PYTHON = os.environ.get("SPARSELING_LLAMA_PYTHON", sys.executable)
LOOK = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llama_cpp') is None)"
HAS_LLAMA = subprocess.run([LLAMA_PYTHON, "-c", LOOK]).returncode == 0
with_llama = pytest.mark.skipif(not HAS_LLAMA, reason="needs llama_cpp; give a Python that has it in SPARSELING_LLAMA_PYTHON")


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


def requests_in(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_tokens_per_second_are_of_the_median_step_in_the_fastest_setting(worker: Path, tmp_path: Path) -> None:
    with LlamaPeer(tmp_path / "log", 2, worker=worker) as peer:
        assert peer.decode(batch=1, prompt_tokens=8, new_tokens=5) == pytest.approx(1 / 0.1)
        assert peer.decode(batch=4, prompt_tokens=8, new_tokens=5) == pytest.approx(4 / 0.05)
        assert peer.prefill(100) == pytest.approx(100 / 0.1)
    asked = requests_in(tmp_path / "log")
    assert len(asked) == 3 + 5 + 3  # two or four settings are tried, then the fastest is measured


def test_settings_are_found_once_for_each_kind_of_request(worker: Path, tmp_path: Path) -> None:
    with LlamaPeer(tmp_path / "log", 2, worker=worker) as peer:
        for _ in range(3):
            peer.decode(batch=2, prompt_tokens=8, new_tokens=5)
    asked = requests_in(tmp_path / "log")
    assert len(asked) == 4 + 3 and asked[-3:] == [{"do": "decode", "batch": 2, "prompt_tokens": 8, "new_tokens": 5, "flash": False,
                                                   "unified": False}] * 3


def test_failures_are_one_sentence_and_the_peer_goes_on(worker: Path, tmp_path: Path) -> None:
    with LlamaPeer(tmp_path / "log", 2, worker=worker) as peer:
        with pytest.raises(UserError, match="unlucky"):
            peer.decode(batch=13, prompt_tokens=1, new_tokens=1)
        assert peer.decode(batch=1, prompt_tokens=1, new_tokens=1) > 0
        with pytest.raises(UserError, match="no JSON"):
            peer.decode(batch=15, prompt_tokens=1, new_tokens=1)
        with pytest.raises(UserError, match="ended with code 3"):
            peer.decode(batch=14, prompt_tokens=1, new_tokens=1)
        with pytest.raises(UserError, match="ended with code 3"):
            peer.prefill(5)


def test_a_peer_that_cannot_start_says_why(worker: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load"):
        LlamaPeer("refuse", 2, worker=worker)
    with pytest.raises(UserError, match="code 1: no such library"):
        LlamaPeer("dies", 2, worker=worker)
    with pytest.raises(UserError, match="cannot be started"):
        LlamaPeer("log", 2, python=tmp_path / "no-python", worker=worker)


def test_closing_ends_the_process_and_openmp_settings_stay_here(worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    peer = LlamaPeer(tmp_path / "log", 2, worker=worker)
    environment = Path(f"/proc/{peer.process.pid}/environ").read_bytes()
    assert b"OMP_WAIT_POLICY" not in environment and b"PATH=" in environment
    peer.close()
    peer.close()
    assert peer.process.returncode == 0


def test_an_interpreter_without_llama_cpp_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ModuleNotFoundError: .*--llama-python"):
        LlamaPeer("model.gguf", 1, python=bare_python(tmp_path))


def bare_python(tmp_path: Path) -> Path:
    """A Python that sees no installed package."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    return script


def test_where_answers_part() -> None:
    assert where_they_part([[1, 2, 3], [1, 2], [4]], [[1, 2, 3], [1, 5], [5]]) == [(1, 1), (2, 0)]


@pytest.mark.slow
@with_llama
def test_llama_cpp_says_the_same_tokens_and_sleeps_between_requests(tmp_path: Path) -> None:
    """Random weights: MTP, groups, one dense layer, prompts of several lengths, one longer than a batch of llama.cpp."""
    config = preset("nano").replace(vocab_size=600, max_position_embeddings=1024, initializer_range=0.1)
    model = initialize(LingForCausalLM(config), 0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + (0 if "bias" in name else 1))
    export_model(model, tmp_path / "model.gguf", "f32")
    prompts = [torch.randint(600, (length,), generator=generator).tolist() for length in (1, 7, 30, 700)]
    with LlamaPeer(tmp_path / "model.gguf", 2, LLAMA_PYTHON) as peer:
        answers = peer.greedy(prompts, 32, kv="f32")
        assert answers == [generate(model, [prompt], 32)[0] for prompt in prompts]
        assert peer.decode(2, 16, 8) > 0 and peer.prefill(600) > 0
        before = cpu_seconds(peer.process.pid)
        time.sleep(1)
        assert cpu_seconds(peer.process.pid) - before < 0.05


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
