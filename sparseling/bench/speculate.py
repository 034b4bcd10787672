"""What guessing tokens with the MTP layer gains on a model: greedy answers to problems, with and without, at several batch sizes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..progress import bar
from ..run.engine import Engine
from ..run.load import stop_ids_of
from ..run.open import open_engine
from ..run.packed import Kind
from ..run.scheduler import Scheduler
from ..run.speculate import Speculator
from .bandwidth import weight_bytes
from .same_tokens import problem_prompts

MOST_TOKENS = 200  # of an answer


def bench_speculate(folder: str, kind: Kind | None, batches: Sequence[int], drafts: Sequence[int], answers: int, threads: int,
                    repetitions: int) -> dict[str, Any]:
    """Greedy answers to `answers` problems with thinking, `batch` at a time, for every batch and every number of guesses, in turns.

    Returns one plain object with a row for each batch and number of guesses: tokens/s, `gain` over no guesses, the share of right guesses
    by place, and `predicted_gain` from the bytes of weights that steps read (`predicted`). Raises `UserError` for a model without an MTP
    layer, `RuntimeError` when guesses change a token.
    """
    torch.set_num_threads(threads)
    engine = open_engine(folder, kind, threads=threads)
    if not engine.ahead:
        raise UserError(f"{folder}: has no MTP layer, so nothing guesses; give a model that has one")
    tokenizer = Tokenizer.load(folder)
    prompts, stop = problem_prompts(tokenizer, answers), stop_ids_of(tokenizer)
    rows = []
    with bar("bench", len(batches) * (len(drafts) + 1) * (repetitions + 1)) as line:
        for batch in batches:
            runs: dict[int, list[float]] = {count: [] for count in [0, *drafts]}
            speculators = {count: Speculator(engine, count, always=True) for count in drafts}
            said: list[list[int]] | None = None
            for _ in range(repetitions + 1):
                for count, speeds in runs.items():
                    answered, seconds = run(engine, speculators.get(count), prompts, stop, batch)
                    if said not in (None, answered):
                        raise RuntimeError("guesses changed what was said: this must not be")
                    said = answered
                    speeds.append(sum(map(len, answered)) / seconds)
                    line.advance()
            for count, speculator in speculators.items():
                right = (speculator.accepted / speculator.proposed.clip(1)).tolist()
                ratios = [mine / plain for mine, plain in zip(runs[count][1:], runs[0][1:], strict=True)]
                rows.append({
                    "batch": batch, "drafts": count, "tokens_per_second": statistics.median(runs[count][1:]),
                    "without": statistics.median(runs[0][1:]), "gain": statistics.median(ratios), "right": right,
                    "predicted_gain": predicted(engine.config, engine.kind, batch, right, len(speculator.words.blocks) * 16),
                })
    return {"model": folder, "weights": engine.kind, "threads": threads, "answers": answers, "repetitions": repetitions, "rows": rows}


def run(engine: Engine, speculator: Speculator | None, prompts: Sequence[list[int]], stop: Sequence[int],
        batch: int) -> tuple[list[list[int]], float]:
    """All answers, and the seconds that they took."""
    scheduler = Scheduler(engine, most_jobs=batch, speculator=speculator)
    start = time.perf_counter()
    jobs = [scheduler.submit(prompt, MOST_TOKENS, stop_ids=stop) for prompt in prompts]
    while scheduler.busy:
        scheduler.step()
    return [job.answer for job in jobs], time.perf_counter() - start


def predicted(config: ModelConfig, kind: Kind, batch: int, right: Sequence[float], words: int) -> float:
    """The gain where reading weights is all that takes time, and tokens choose experts evenly and apart from each other: more tokens a
    step, against more experts to read, and the MTP layer with `words` rows of the head for every guess."""
    weights, layers = weight_bytes(config, kind), config.num_hidden_layers
    moe = sum(not config.is_dense(layer) for layer in range(layers))

    def hit(tokens: int) -> float:
        return config.num_experts * (1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens)

    def step(tokens: int) -> float:
        return weights.always + moe * hit(tokens) * weights.expert

    hidden, head_dim = config.hidden_size, config.head_dim
    heads = config.num_attention_heads * head_dim
    own = heads + 2 * config.num_key_value_heads * head_dim + heads + 2 * hidden + words + 3 * config.shared_expert_intermediate_size
    guess = own * hidden * weights.expert / (3 * hidden * config.moe_intermediate_size) + hit(batch) * weights.expert
    tokens, reach = 1.0, 1.0
    for share in right:
        reach *= share
        tokens += reach
    return tokens * step(batch) / (step(batch * (len(right) + 1)) + len(right) * guess)
