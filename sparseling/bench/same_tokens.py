"""Greedy answers of one model by PyTorch, by the native engine, and by llama.cpp on the exported file, token by token.

    python -m sparseling.bench.same_tokens runs/laptop --llama-python llama-venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..align.chat import Message
from ..align.conversations import prompt_ids
from ..checkpoint.gguf import export_folder
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..info import model_folder
from ..model.transformer import LingForCausalLM
from ..progress import track
from ..run.generate import generate
from ..run.load import load, stop_ids_of
from ..run.sampler import GREEDY
from ..run.scheduler import scheduler_for, stream_job
from ..study.tasks import LAPTOP, evaluation_problems
from .llama import LlamaPeer

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def problem_prompts(tokenizer: Tokenizer, count: int, seed: int = 0) -> list[list[int]]:
    """Held-out problems of the laptop's families in turn, as chats with thinking on."""
    each = -(-count // len(LAPTOP))
    problems = [problem for group in zip(*(evaluation_problems(task, each, seed) for task in LAPTOP), strict=True) for problem in group]
    return [prompt_ids([Message("user", problem.prompt)], tokenizer, True) for problem in problems[:count]]


def where_they_part(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(answer, place) of the first different token of each pair of answers that differ."""
    parted = []
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if list(one) != list(other):
            places = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
            parted.append((number, next(places, min(len(one), len(other)))))
    return parted


@torch.inference_mode()
def logit_gap(model: LingForCausalLM, ids: Sequence[int], first: int, second: int) -> float:
    """How much higher the logit of `first` is than that of `second` after `ids`, by PyTorch."""
    logits = model.logits(model(torch.tensor([list(ids)])).hidden_states[0, -1])
    return float(logits[first] - logits[second])


def engine_answers(model: LingForCausalLM, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Greedy answers of the native engine, one after another."""
    scheduler = scheduler_for(model)
    if scheduler is None:
        raise UserError("the native engine cannot run this model here; compile the kernels, or give another model")
    return [list(stream_job(scheduler, prompt, new_tokens, GREEDY, ())) for prompt in track(prompts, "native engine", len(prompts))]


def compare(folder: Path, kind: str, count: int, new_tokens: int, python: str, threads: int, kv: str) -> dict[str, Any]:
    """How many of `count` answers of `new_tokens` tokens are equal in `kind` ("f32", "bf16"), and where the others part.

    `kv`: type of llama.cpp's keys and values. Raises `UserError` where one of the three cannot run the model.
    """
    model, tokenizer = load(folder, DTYPES[kind])
    prompts = problem_prompts(tokenizer, count)
    with tempfile.TemporaryDirectory() as aside:
        export_folder(folder, Path(aside) / "model.gguf", kind)
        with LlamaPeer(Path(aside) / "model.gguf", threads, python) as peer:
            version, answers = peer.version, {"llama.cpp": peer.greedy(prompts, new_tokens, kv)}
    answers["engine"] = engine_answers(model, prompts, new_tokens)
    answers["pytorch"] = [generate(model, [prompt], new_tokens)[0] for prompt in track(prompts, "PyTorch", len(prompts))]
    result: dict[str, Any] = {"kind": kind, "kv": kv, "prompts": count, "new_tokens": new_tokens, "llama_cpp_python": version}
    for one, other in (("engine", "pytorch"), ("engine", "llama.cpp"), ("pytorch", "llama.cpp")):
        parted = [details(model, prompts[number], answers[one][number], answers[other][number], place, stop_ids_of(tokenizer))
                  | {"prompt": number} for number, place in where_they_part(answers[one], answers[other])]
        answers_equal = count - sum(not part["after_end"] for part in parted)
        result[f"{one} = {other}"] = {"equal": count - len(parted), "equal_to_end_of_answer": answers_equal, "parted": parted}
    return result


def details(model: LingForCausalLM, prompt: Sequence[int], one: Sequence[int], other: Sequence[int], place: int,
            stops: Sequence[int]) -> dict[str, Any]:
    """Where two answers part, how near the two tokens were (the first's logit less the second's, by PyTorch), and whether the answer had
    ended before, so that nobody would have seen it."""
    gap = logit_gap(model, [*prompt, *one[:place]], one[place], other[place])
    return {"at": place, "logit_gap": round(gap, 5), "after_end": any(token in stops for token in one[:place])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run folder or model folder")
    parser.add_argument("--llama-python", default="python3", help="interpreter that has llama_cpp")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        folder = model_folder(options.model)
        results = [compare(folder, kind, options.prompts, options.new_tokens, options.llama_python, options.threads, kv)
                   for kind, kv in (("f32", "f32"), ("bf16", "bf16"))]
    except UserError as error:
        sys.exit(f"same_tokens: {error}")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
