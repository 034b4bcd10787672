"""The peer llama.cpp: a process of its own that keeps a GGUF file loaded, so that ours and it can be measured in turns.

    with LlamaPeer("model.gguf", threads=2, python="llama-venv/bin/python") as peer:
        print(peer.decode(batch=1, prompt_tokens=64, new_tokens=64))
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError

WORKER = Path(__file__).with_name("llama_worker.py")
END_SECONDS = 10  # that the process has to end in, once its input is closed


class LlamaPeer:
    """llama.cpp with one model. `python`: an interpreter that has llama_cpp (None: this one); `worker`: the script that it runs.

    Between requests the process sleeps. Raises `UserError` when it cannot be started or cannot load the file.
    """

    def __init__(self, gguf: str | Path, threads: int, python: str | Path | None = None, worker: Path = WORKER) -> None:
        self.python = str(python or sys.executable)
        self.fastest: dict[tuple[Any, ...], dict[str, bool]] = {}  # the settings for each kind of request
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115, as long-lived as this
        command = [self.python, str(worker), str(gguf), str(threads)]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                            env=environment())
        except OSError as error:
            raise UserError(f"--llama-python {self.python}: cannot be started ({error.strerror}); give a Python that has llama_cpp"
                            ) from None
        try:
            ready = self.answer()
        except BaseException:
            self.close()
            raise
        self.version, self.system = str(ready["version"]), str(ready["system"])

    def __enter__(self) -> LlamaPeer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def decode(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        """Tokens/s of all sequences together, by the median step: `batch` sequences, each after a prompt of its own."""
        return batch / self.faster({"do": "decode", "batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens})

    def prefill(self, tokens: int) -> float:
        """Tokens/s of computing a prompt of so many tokens, 512 at a time."""
        return tokens / self.faster({"do": "prefill", "tokens": tokens})

    def greedy(self, prompts: Sequence[Sequence[int]], new_tokens: int, kv: str = "f16") -> list[list[int]]:
        """`new_tokens` likeliest tokens after each prompt; keys and values are kept in `kv`: f32, f16 or bf16."""
        return self.request({"do": "greedy", "prompts": [list(map(int, p)) for p in prompts], "new_tokens": new_tokens, "kv": kv})["tokens"]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids that llama.cpp makes of each text; strings of special tokens are plain text."""
        return self.request({"do": "tokenize", "texts": list(texts)})["tokens"]

    def faster(self, request: dict[str, Any]) -> float:
        """Median seconds in the fastest setting (flash attention; one KV buffer or one each), found before the first such request."""
        key = tuple(request.values())
        if key not in self.fastest:
            unified = (True, False) if request.get("batch", 1) > 1 else (True,)
            settings = [{"flash": flash, "unified": one} for flash in (True, False) for one in unified]
            self.fastest[key] = min(settings, key=lambda setting: self.median_seconds(request | setting))
        return self.median_seconds(request | self.fastest[key])

    def median_seconds(self, request: dict[str, Any]) -> float:
        return statistics.median(self.request(request)["seconds"])

    def request(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request. Raises `UserError` when there is none."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self.gone() from None
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self.gone()
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            raise UserError(f"llama.cpp ({self.python}): answered {line.strip()[:200]!r}, which is no JSON; see to that installation"
                            ) from None
        if "error" in answer:
            raise UserError(f"llama.cpp ({self.python}): {answer['error']}; {mend(str(answer['error']))}")
        return answer

    def gone(self) -> UserError:
        """Why the process ended, by the last line it printed."""
        self.close()
        self.errors.seek(0)
        last = next((line for line in reversed(self.errors.read().splitlines()) if line.strip()), "")
        return UserError(f"llama.cpp ({self.python}): the process ended with code {self.process.returncode}"
                         f"{': ' + last.strip()[:300] if last else ''}; see to that installation, or leave llama.cpp out")

    def close(self) -> None:
        """End the process; it may be called twice."""
        if self.process.returncode is not None:
            return
        try:
            self.process.communicate(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


def mend(error: str) -> str:
    if error.startswith("ModuleNotFoundError"):
        return "install llama-cpp-python there, or give another interpreter with --llama-python"
    return "see to the file or the request"


def environment() -> dict[str, str]:
    """Ours without settings of OpenMP: with its own, the peer's threads wait actively for a moment and then sleep, which is its best."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
