"""The protocol with the peer process, against a made worker; and llama.cpp itself where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseling.bench.llama import LlamaPeer
from sparseling.bench.same_tokens import compare, details, where_they_part
from sparseling.checkpoint.gguf import export_folder, export_model
from sparseling.checkpoint.gguf_names import IN_LAYER
from sparseling.checkpoint.hf import save_model
from sparseling.config import ModelConfig, preset
from sparseling.data.tokenizer import train_tokenizer
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


NANO = preset("nano").replace(vocab_size=600, max_position_embeddings=1024, initializer_range=0.1)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "mtp": NANO,
    "yarn": NANO.replace(rope_scaling=YARN),
    "tied head, all groups kept": NANO.replace(tie_word_embeddings=True, topk_group=8, num_nextn_predict_layers=0),
    "one expert, two shared, no groups": NANO.replace(num_experts_per_tok=1, num_shared_experts=2, n_group=1, topk_group=1),
    "two dense layers, all rotated": NANO.replace(first_k_dense_replace=2, partial_rotary_factor=1.0),
}


def random_model(config: ModelConfig) -> LingForCausalLM:
    """Random weights; norms about 1, expert biases about 0."""
    model, generator = initialize(LingForCausalLM(config), 0).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1 + (0 if "bias" in name else 1))
    return model


@pytest.mark.slow
@with_llama
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_llama_cpp_says_the_same_tokens(tmp_path: Path, variant: str) -> None:
    """Prompts of several lengths, one longer than a batch of llama.cpp."""
    model, generator = random_model(VARIANTS[variant]), torch.Generator().manual_seed(2)
    export_model(model, tmp_path / "model.gguf", "f32")
    prompts = [torch.randint(600, (length,), generator=generator).tolist() for length in (1, 7, 30, 700)]
    with LlamaPeer(tmp_path / "model.gguf", 1, LLAMA_PYTHON) as peer:
        assert peer.greedy(prompts, 32, kv="f32") == [generate(model, [prompt], 32)[0] for prompt in prompts]


@pytest.mark.slow
@with_llama
def test_three_ways_to_answer_are_compared(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["What is 12 + 34? detailed thinking on SYSTEM HUMAN ASSISTANT"] * 20, 330, tmp_path / "tokenizer")
    config = NANO.replace(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    save_model(random_model(config), config, tmp_path / "model", tmp_path / "tokenizer", torch.float32)
    result = compare(tmp_path / "model", "f32", 6, 16, LLAMA_PYTHON, 1, "f32")
    assert {name: pair["equal"] for name, pair in result.items() if "=" in name} == {
        "engine = pytorch": 6, "engine = llama.cpp": 6, "pytorch = llama.cpp": 6}
    model = random_model(config)
    prompt = [1, 2, 3]
    (best,) = generate(model, [prompt], 1)[0]
    part = details(model, prompt, [7, best, 5], [7, 9, 5], 1, (7,))
    assert part["at"] == 1 and part["after_end"] and not details(model, prompt, [best], [9], 0, (7,))["after_end"]
    assert details(model, prompt, [best], [9 if best != 9 else 8], 0, ())["logit_gap"] > 0


@pytest.mark.slow
@with_llama
def test_llama_cpp_sleeps_between_requests(tmp_path: Path) -> None:
    export_model(random_model(NANO), tmp_path / "model.gguf", "bf16")
    with LlamaPeer(tmp_path / "model.gguf", 2, LLAMA_PYTHON) as peer:
        assert peer.decode(2, 16, 8) > 0 and peer.prefill(600) > 0
        before = cpu_seconds(peer.process.pid)
        time.sleep(1)
        assert cpu_seconds(peer.process.pid) - before < 0.05


@pytest.mark.slow
@with_llama
@pytest.mark.parametrize("change", [{"head_dim": 64}, {"use_qk_norm": False}, {"use_bias": True}, {"use_qkv_bias": True},
                                    {"num_shared_experts": 0}], ids=str)
def test_what_is_refused_llama_cpp_really_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    """Written all the same, such a model does not load."""
    model = random_model(NANO.replace(**change))
    monkeypatch.setattr("sparseling.checkpoint.gguf.refuse_unloadable", lambda config, source: None)
    for kind in ("dense", "query_key_value"):  # the names that llama.cpp would have for them
        monkeypatch.setitem(IN_LAYER, f"attention.{kind}.bias", IN_LAYER[f"attention.{kind}.weight"].replace("weight", "bias"))
    export_model(model, tmp_path / "model.gguf", "f32")
    with pytest.raises(UserError, match="cannot load"):
        LlamaPeer(tmp_path / "model.gguf", 1, LLAMA_PYTHON)


@pytest.mark.slow
@with_llama
def test_llama_cpp_makes_the_same_tokens_of_text_but_for_its_unicode_form(tmp_path: Path) -> None:
    texts = [
        "It's 12,345 o'clock;  we'LL see.\n\n  Größe 数 ünï\t(x+y)=z\r\n<role>HUMAN</role> \u00a0!?...  ", "\n \n", " a  b   c",
        "日本語 and ½²³",
    ]
    tokenizer = train_tokenizer(texts * 20, 330, tmp_path / "tokenizer")
    config = NANO.replace(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    save_model(random_model(config), config, tmp_path / "model", tokenizer_folder=tmp_path / "tokenizer")
    export_folder(tmp_path / "model", tmp_path / "model.gguf", "bf16")
    decomposed = unicodedata.normalize("NFD", texts[0])
    with LlamaPeer(tmp_path / "model.gguf", 1, LLAMA_PYTHON) as peer:
        assert peer.tokenize(texts) == [tokenizer.encode(text) for text in texts]
        assert peer.tokenize([decomposed]) != [tokenizer.encode(decomposed)]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
