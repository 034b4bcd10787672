"""llama.cpp behind standard input and output: one JSON request a line, one JSON answer a line.

Run as a script by a Python that has llama_cpp (it need not have sparseling); bench/llama.py starts it. The first line, once the model is
loaded, is {"ready": true, ...}. Requests: {"do": "decode", "batch", "prompt_tokens", "new_tokens", "flash", "unified"},
{"do": "prefill", "tokens", "flash", "unified"}, {"do": "greedy", "prompts", "new_tokens", "kv"}, {"do": "tokenize", "texts"}. An answer
is {"error": why} when a request fails.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

BATCH_TOKENS = 512  # n_batch and n_ubatch
WARM_UP_STEPS = 3
KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30}
FLASH = {False: 0, True: 1}
IDS_SEED = 1


class Llama:
    """One loaded model, and one context at a time."""

    def __init__(self, library: Any, path: str, threads: int) -> None:
        self.library, self.threads = library, threads
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = library.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocabulary = library.llama_model_get_vocab(self.model)
        self.tokens = library.llama_vocab_n_tokens(self.vocabulary)
        self.context: Any = None
        self.key: tuple[Any, ...] = ()
        self.batch = library.llama_batch_init(BATCH_TOKENS, 0, 1)

    def open(self, positions: int, sequences: int = 1, flash: bool = False, unified: bool = True, kv: str = "f16") -> None:
        """A context with room for `positions` in all, the sequences in one KV buffer (`unified`) or in one each; the last one when it is
        the same."""
        key = (positions, sequences, flash, unified, kv)
        if key == self.key:
            self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
            return
        self.close()
        parameters = self.library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = positions, sequences
        parameters.n_batch = parameters.n_ubatch = BATCH_TOKENS
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type = FLASH[flash]
        parameters.type_k = parameters.type_v = KV_TYPES[kv]
        parameters.kv_unified, parameters.no_perf, parameters.offload_kqv, parameters.op_offload = unified, True, False, False
        self.context = self.library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context for {positions} positions")
        self.key = key

    def close(self) -> None:
        if self.context is not None:
            self.library.llama_free(self.context)
        self.context, self.key = None, ()

    def run(self, entries: Sequence[tuple[int, int, int]], logits: bool = True) -> float:
        """Decode (token, position, sequence) entries; logits, if wanted, of the last entry of each sequence. Seconds of llama.cpp alone,
        without what Python does before."""
        last = {sequence: number for number, (_, _, sequence) in enumerate(entries)} if logits else {}
        batch = self.batch
        for number, (token, position, sequence) in enumerate(entries):
            batch.token[number], batch.pos[number] = token, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, sequence
            batch.logits[number] = last.get(sequence) == number
        batch.n_tokens = len(entries)
        start = time.perf_counter()
        code = self.library.llama_decode(self.context, batch)
        self.library.llama_synchronize(self.context)
        seconds = time.perf_counter() - start
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")
        return seconds

    def fill(self, sequence: int, tokens: Sequence[int]) -> float:
        """Compute a prompt, `BATCH_TOKENS` at a time; logits of its last token. Seconds as `run` counts them."""
        seconds = 0.0
        for start in range(0, len(tokens), BATCH_TOKENS):
            part = tokens[start:start + BATCH_TOKENS]
            entries = [(token, start + n, sequence) for n, token in enumerate(part)]
            seconds += self.run(entries, logits=start + BATCH_TOKENS >= len(tokens))
        return seconds

    def likeliest(self) -> int:
        """The greedy token after the last entry that was run; the smallest id of equals."""
        logits = self.library.llama_get_logits_ith(self.context, -1)
        values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self.tokens)).contents
        return max(range(self.tokens), key=values.__getitem__)


def decode(llama: Llama, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step of `batch` sequences after prompts of their own, random tokens, nothing sampled."""
    batch, prompt, steps = request["batch"], request["prompt_tokens"], request["new_tokens"]
    ids = random.Random(IDS_SEED)
    llama.open(batch * (prompt + WARM_UP_STEPS + steps), batch, request["flash"], request["unified"])
    for sequence in range(batch):
        llama.fill(sequence, [ids.randrange(llama.tokens) for _ in range(prompt)])
    seconds = []
    for step in range(WARM_UP_STEPS + steps):
        entries = [(ids.randrange(llama.tokens), prompt + step, sequence) for sequence in range(batch)]
        seconds.append(llama.run(entries))
    return {"seconds": seconds[WARM_UP_STEPS:]}


def prefill(llama: Llama, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of computing one prompt; a new context is warmed by one before."""
    ids, count = random.Random(IDS_SEED), request["tokens"]
    tokens = [ids.randrange(llama.tokens) for _ in range(count)]
    for fresh in (True, False):
        before = llama.key
        llama.open(count, 1, request["flash"], request["unified"])
        seconds = llama.fill(0, tokens)
        if fresh and llama.key == before:
            break
    return {"seconds": [seconds]}


def greedy(llama: Llama, request: dict[str, Any]) -> dict[str, Any]:
    """`new_tokens` likeliest tokens after each prompt of token ids, whatever they are."""
    longest = max(map(len, request["prompts"])) + request["new_tokens"]
    answers = []
    for prompt in request["prompts"]:
        llama.open(longest, kv=request["kv"])
        llama.fill(0, prompt)
        answer = [llama.likeliest()]
        while len(answer) < request["new_tokens"]:
            llama.run([(answer[-1], len(prompt) + len(answer) - 1, 0)])
            answer.append(llama.likeliest())
        answers.append(answer)
    return {"tokens": answers}


def tokenize(llama: Llama, request: dict[str, Any]) -> dict[str, Any]:
    """Token ids of texts, strings of special tokens being plain text."""
    answers = []
    for text in request["texts"]:
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = llama.library.llama_tokenize(llama.vocabulary, raw, len(raw), room, len(room), False, False)
        answers.append(list(room[:count]))
    return {"tokens": answers}


REQUESTS: dict[str, Callable[[Llama, dict[str, Any]], dict[str, Any]]] = {
    "decode": decode, "prefill": prefill, "greedy": greedy, "tokenize": tokenize,
}


def serve(llama: Llama, requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = REQUESTS[request["do"]](llama, request)
        except Exception as error:
            llama.close()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    # What llama.cpp itself prints on file descriptor 1 must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        import llama_cpp

        quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama = Llama(llama_cpp, sys.argv[1], int(sys.argv[2]))
        version, system = llama_cpp.__version__, llama_cpp.llama_print_system_info().decode()
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        answers.flush()
        return
    answers.write(json.dumps({"ready": True, "version": version, "system": system, "vocabulary": llama.tokens}) + "\n")
    answers.flush()
    serve(llama, sys.stdin, answers)


if __name__ == "__main__":
    main()
