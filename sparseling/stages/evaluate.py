"""The eval stage: exact-match accuracy on held-out problems, both thinking modes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from ..progress import say
from ..recipe import Eval
from ..run.generate import generate
from ..run.load import load
from ..study.evaluate import EvalResult, evaluate_tasks
from .context import Context


def run(context: Context, stage: Eval) -> dict[str, Any]:
    """Evaluate the named stages' models (default: the last one); returns accuracy by stage and the last one's samples."""
    names = stage.stages or (context.last_model().parent.name,)
    results = {name: evaluate_model(context.model_of(name), stage, context.recipe.seed, context.device) for name in names}
    for name, result in results.items():
        for task, by_mode in result.accuracy.items():
            cells = "  ".join(f"{mode} {cell['accuracy']:.0%} ({cell['low']:.0%} to {cell['high']:.0%})" for mode, cell in by_mode.items())
            say(f"{name}: {task}: thinking {cells}")
    return {
        "result_of": names[-1], "accuracy_by_stage": {name: result.accuracy for name, result in results.items()},
        "samples": [dict(sample) for sample in results[names[-1]].samples],
    }


def evaluate_model(folder: Path, stage: Eval, seed: int, device: str | None = None) -> EvalResult:
    """Greedy answers of one model to `problems` held-out problems of every family in every mode."""
    model, tokenizer = load(folder, device=device)
    answer = partial(generate_ids, model, (tokenizer.eos_id, tokenizer.pad_id))
    return evaluate_tasks(answer, tokenizer, stage.tasks, stage.modes, stage.problems, seed)


def generate_ids(model: Any, stop_ids: tuple[int, ...], prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations without the stop tokens."""
    return generate(model, prompts, max_new_tokens, stop_ids=stop_ids)
