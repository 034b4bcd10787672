"""The verb in a process of its own: it listens, drains at SIGTERM, and says in a sentence what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sparseling.checkpoint.hf import save_model
from sparseling.cli import main
from sparseling.data.tokenizer import Tokenizer
from sparseling.model.transformer import LingForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: LingForCausalLM, tokenizer: Tokenizer) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, model.config.replace(max_position_embeddings=4096), path, tokenizer_folder=tokenizer.folder)
    return path


def launch(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sparseling.cli", "serve", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"on (http://127\.0\.0\.1:\d+) ", line):
            return match[1]
    raise AssertionError("it did not start")


def body_of(tokens: int, tokenizer: Tokenizer) -> bytes:
    """A stream of exactly so many tokens."""
    bias = {str(token): -100 for token in (tokenizer.eos_id, tokenizer.end_of_text_id)}
    return json.dumps({"prompt": "How many?", "max_tokens": tokens, "stream": True, "seed": 1, "logit_bias": bias,
                       "stream_options": {"include_usage": True}}).encode()


def stream_of(url: str, body: bytes, into: list[bytes]) -> None:
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        while part := reply.read1(65536):
            into.append(part)


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones(folder: Path, tokenizer: Tokenizer) -> None:
    process = launch(str(folder), "--port", "0", "--weights", "fp32", "--threads", "1")
    try:
        url = address(process)
        data: list[bytes] = []
        reader = threading.Thread(target=stream_of, args=(url, body_of(3000, tokenizer), data))
        reader.start()
        while len(data) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        refused = set()
        while reader.is_alive():
            try:
                stream_of(url, body_of(1, tokenizer), [])
            except urllib.error.HTTPError as error:
                refused.add((error.code, json.loads(error.read())["error"]["code"], error.headers["Retry-After"]))
            except (urllib.error.URLError, ConnectionError, OSError):
                break
            time.sleep(0.02)
        reader.join(60)
        whole = b"".join(data)
        assert refused == {(503, "draining", "5")}
        assert whole.endswith(b"data: [DONE]\n\n") and b'"finish_reason":"length"' in whole and b'"completion_tokens":3000' in whole
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_ends_it_at_once(folder: Path, tokenizer: Tokenizer) -> None:
    process = launch(str(folder), "--port", "0", "--threads", "1")
    try:
        url = address(process)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as plain:
            body = body_of(4000, tokenizer)
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
            plain.sendall(head.format(len(body)).encode() + body)
            assert plain.recv(10)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            process.wait(20)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("arguments", "says", "code"), [
    (["--context", "99999999"], "--context: 99,999,999 is more than 32 times", 2), (["--cache-gb", "0.00001"], "--cache-gb", 1),
    (["--port", "-3"], "--port", 2),
    (["--host", "256.1.1.1"], "cannot be listened at", 1), (["--api-key-file", "/nowhere"], "/nowhere", 1),
    (["--port", "70000"], "--port", 2),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str,
                                             code: int) -> None:
    try:
        got = main(["serve", str(folder), "--port", "0", *arguments])
    except SystemExit as end:                                                     # argparse
        got = end.code
    assert got == code and says in capsys.readouterr().err
