"""Exact-match accuracy on held-out problems, in both thinking modes, with confidence intervals and the best constant answer beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from ..align.chat import Message, parse_response
from ..align.conversations import ChatTokenizer, Conversation, prompt_ids, tokenize_conversation
from ..errors import UserError
from ..progress import bar
from .tasks import HELD_OUT_SHARE, Problem, constant_baseline, evaluation_problems

Generate = Callable[[list[list[int]], int], list[list[int]]]
MODES = ("on", "off")
PROMPTS_PER_CALL = 64
SAMPLES_PER_CELL = 4


@dataclass(frozen=True)
class EvalResult:
    """`accuracy` {task: {mode: {"accuracy", "low", "high", "n", "constant_baseline"}}} and a few answers of each task and mode:
    `samples` [{"task", "mode", "prompt", "reasoning", "answer", "expected", "correct"}]."""

    accuracy: dict[str, dict[str, dict[str, float]]]
    samples: list[dict[str, str | bool | None]]


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high): Wilson's score interval of a proportion, correct out of n (Wilson 1927). Without data it is (0, 1)."""
    if not 0 <= correct <= n:
        raise ValueError(f"correct = {correct} is not between 0 and n = {n}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at the ends the bound is exactly 0 or 1; rounding must not put the share outside of its own interval
    return (0.0 if correct == 0 else max(0.0, middle - half)), (1.0 if correct == n else min(1.0, middle + half))


def extract_answer(text: str) -> str:
    """The answer in an assistant's text: what follows the thinking, with spaces normalised and without a closing full stop.

    Where the text itself says "answer is" or "Answer:", only what follows. Thinking that never closed gives ''.
    """
    answer = " ".join(parse_response(text)[1].split())
    for marker in ("answer is", "answer:"):
        place = answer.lower().rfind(marker)
        if place >= 0:
            answer = answer[place + len(marker):]
    return answer.strip().removesuffix(".").rstrip()


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are the same but for case and spaces."""
    return " ".join(answer.split()).lower() == " ".join(expected.split()).lower()


def evaluate_tasks(
    generate: Generate,
    tokenizer: ChatTokenizer,
    tasks: Sequence[str],
    modes: Sequence[str] = MODES,
    n: int = 200,
    seed: int = 0,
    held_out_share: float = HELD_OUT_SHARE,
) -> EvalResult:
    """Ask `n` held-out problems of each task in each mode ("on", "off") and compare the answers exactly.

    `generate(prompts, max_new_tokens)` continues each prompt (token ids) greedily and returns the new ids alone; it may stop at
    `<|role_end|>` or go on. A family with fewer than `n` held-out problems is asked all of them. Raises `UserError` for an unknown
    task or mode.
    """
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"modes: '{mode}' is no thinking mode; use on or off")
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    samples: list[dict[str, str | bool | None]] = []
    problems_by_task = {task: evaluation_problems(task, n, seed, held_out_share) for task in tasks}
    with bar("evaluate", total=sum(map(len, problems_by_task.values())) * len(modes)) as line:
        for task, problems in problems_by_task.items():
            for mode in modes:
                line.note(f"{task}, thinking {mode}")
                responses: list[str] = []
                for start in range(0, len(problems), PROMPTS_PER_CALL):
                    part = problems[start : start + PROMPTS_PER_CALL]
                    responses += _responses(generate, tokenizer, part, mode == "on")
                    line.advance(len(part))
                graded = [_graded(problem, mode, response) for problem, response in zip(problems, responses, strict=True)]
                accuracy.setdefault(task, {})[mode] = _cell(problems, sum(bool(sample["correct"]) for sample in graded))
                samples += graded[:SAMPLES_PER_CELL]
    return EvalResult(accuracy, samples)


def _responses(generate: Generate, tokenizer: ChatTokenizer, problems: Sequence[Problem], thinking: bool) -> list[str]:
    """The model's texts, each up to `<|role_end|>`. The room for an answer is twice what the longest worked solution takes."""
    prompts = [prompt_ids([Message("user", problem.prompt)], tokenizer, thinking) for problem in problems]
    worked = [sum(tokenize_conversation(_solved(problem, thinking), tokenizer).loss_mask) for problem in problems]
    (role_end,) = tokenizer.encode("<|role_end|>", allow_special=True)
    generated = generate(prompts, 2 * max(worked) + 8)
    return [tokenizer.decode(ids[: ids.index(role_end)] if role_end in ids else ids) for ids in generated]


def _solved(problem: Problem, thinking: bool) -> Conversation:
    reply = Message("assistant", problem.answer, "\n".join(problem.steps) if thinking else None)
    return Conversation((Message("user", problem.prompt), reply), thinking)


def _graded(problem: Problem, mode: str, response: str) -> dict[str, str | bool | None]:
    answer = extract_answer(response)
    return {
        "task": problem.task, "mode": mode, "prompt": problem.prompt, "reasoning": parse_response(response)[0], "answer": answer,
        "expected": problem.answer, "correct": exact_match(answer, problem.answer),
    }


def _cell(problems: Sequence[Problem], correct: int) -> dict[str, float]:
    low, high = wilson_interval(correct, len(problems))
    return {
        "accuracy": correct / len(problems), "low": low, "high": high, "n": len(problems),
        "constant_baseline": constant_baseline(problems),
    }


def accuracy_table(accuracy: dict[str, dict[str, dict[str, float]]]) -> str:
    """Accuracy by task and mode for the terminal, with 95% intervals and the best constant answer."""
    lines = [f"{'task':<26}{'thinking':<10}{'exact match':>12}{'95% interval':>18}{'best constant':>15}{'problems':>10}"]
    for task, by_mode in accuracy.items():
        for mode, cell in by_mode.items():
            interval = f"{cell['low']:.1%} to {cell['high']:.1%}"
            lines.append(f"{task:<26}{mode:<10}{cell['accuracy']:>12.1%}{interval:>18}{cell['constant_baseline']:>15.1%}{cell['n']:>10.0f}")
    return "\n".join(lines)
