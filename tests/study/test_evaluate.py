"""Wilson intervals, answers taken from text, and the evaluation of models that are right, wrong, cut off, or mute."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sparseling.align.chat import Message, render
from sparseling.align.conversations import prompt_ids
from sparseling.data.tokenizer import Tokenizer, train_tokenizer
from sparseling.errors import UserError
from sparseling.study.evaluate import Generate, evaluate_tasks, exact_match, extract_answer, wilson_interval
from sparseling.study.tasks import LAPTOP, constant_baseline, conversations, evaluation_problems, is_held_out


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (1, 10), (5, 10), (10, 10), (197, 200), (3, 1000)])
def test_wilson_bounds_solve_the_score_equation(correct: int, n: int) -> None:
    """The bounds are the p at which |share - p| is 1.96 standard errors of p: found here by bisection."""
    low, high = wilson_interval(correct, n)
    share, z = correct / n, 1.959963984540054

    def excess(p: float) -> float:
        return abs(share - p) - z * math.sqrt(p * (1 - p) / n)

    for bound, outside in ((low, 0.0), (high, 1.0)):
        if share == outside:
            assert bound == outside
            continue
        inside = share
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if excess(middle) > 0 else (middle, outside)
        assert abs(bound - inside) < 1e-9


def test_wilson_covers_the_truth() -> None:
    """Exact binomial coverage over all truths: 95% on average, never far below."""
    n = 60
    covered = []
    for percent in range(1, 100):
        p = percent / 100
        chances = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
        covered.append(sum(chance for k, chance in enumerate(chances) if wilson_interval(k, n)[0] <= p <= wilson_interval(k, n)[1]))
    assert abs(sum(covered) / len(covered) - 0.95) < 0.01 and min(covered) > 0.83


def test_wilson_edges() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 5)[0] == 0.0 and wilson_interval(5, 5)[1] == 1.0
    narrow, wide = wilson_interval(40, 50, confidence=0.5), wilson_interval(40, 50, confidence=0.99)
    assert wide[0] < narrow[0] < 0.8 < narrow[1] < wide[1]
    with pytest.raises(ValueError, match="not between"):
        wilson_interval(3, 2)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("132", "132"),
        ("\n<think>\n47+85\n</think>\n\n132<|role_end|>junk", "132"),
        ("The answer is 132.", "132"),
        ("First guess: 7. Answer: 132 ", "132"),
        (" a  c\nk ", "a c k"),
        ("\n<think>\nthe answer is 132", ""),
        ("", ""),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


def test_exact_match() -> None:
    assert exact_match(" A  c k", "a c k") and exact_match("85", "85")
    assert not exact_match("85", "8") and not exact_match("", "85") and not exact_match("0 85", "85")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [render(conversation.messages, conversation.thinking) for conversation in conversations(LAPTOP, seed=3, n=200)]
    return train_tokenizer(texts, 600, tmp_path_factory.mktemp("tokenizer"))


def oracle(tokenizer: Tokenizer, tasks: list[str], n: int, wrong_every: int = 0, after: str = "<|role_end|>more") -> Generate:
    """A model that knows every solution: in thinking mode it writes the steps; each `wrong_every`-th answer is wrong."""
    known = {}
    for task in tasks:
        for index, problem in enumerate(evaluation_problems(task, n, seed=1)):
            answer = "nothing" if wrong_every and index % wrong_every == 0 else problem.answer
            for thinking in (True, False):
                worked = "\n<think>\n" + "\n".join(problem.steps) + "\n</think>\n\n" if thinking else ""
                prompt = prompt_ids([Message("user", problem.prompt)], tokenizer, thinking)
                known[tuple(prompt)] = tokenizer.encode(worked + answer + after, allow_special=True)

    def generate(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        return [known[tuple(prompt)][:max_new_tokens] for prompt in prompts]

    return generate


def test_a_model_that_knows_everything(tokenizer: Tokenizer) -> None:
    tasks = ["two_digit_addition", "sort_letters", "multiplication"]
    result = evaluate_tasks(oracle(tokenizer, tasks, 100), tokenizer, tasks, n=100, seed=1)
    assert list(result.accuracy) == tasks
    for task in tasks:
        held_out = evaluation_problems(task, 100, seed=1)
        assert all(is_held_out(problem) for problem in held_out)
        for mode in ("on", "off"):
            cell = result.accuracy[task][mode]
            assert cell["accuracy"] == cell["high"] == 1.0 and 0.9 < cell["low"] < 1.0
            assert cell["n"] == len(held_out) and cell["constant_baseline"] == constant_baseline(held_out)
    assert result.accuracy["multiplication"]["on"]["n"] < 100  # all that there are
    thought = [sample for sample in result.samples if sample["mode"] == "on"]
    assert thought and all(sample["reasoning"] and sample["correct"] and sample["answer"] == sample["expected"] for sample in thought)
    assert all(sample["reasoning"] is None for sample in result.samples if sample["mode"] == "off")


def test_wrong_answers_are_counted(tokenizer: Tokenizer) -> None:
    result = evaluate_tasks(oracle(tokenizer, ["maximum"], 80, wrong_every=4), tokenizer, ["maximum"], ["off"], n=80, seed=1)
    cell = result.accuracy["maximum"]["off"]
    assert cell["accuracy"] == 0.75 and (cell["low"], cell["high"]) == wilson_interval(60, 80)
    assert set(result.accuracy["maximum"]) == {"off"}
    assert [sample["correct"] for sample in result.samples[:4]] == [False, True, True, True]


def test_rambling_after_the_answer_is_wrong_and_silence_is_wrong(tokenizer: Tokenizer) -> None:
    rambling = evaluate_tasks(oracle(tokenizer, ["maximum"], 20, after=" and so on"), tokenizer, ["maximum"], n=20, seed=1)
    silent = evaluate_tasks(lambda prompts, room: [[] for _ in prompts], tokenizer, ["maximum"], n=20, seed=1)
    for result in (rambling, silent):
        assert {cell["accuracy"] for cell in result.accuracy["maximum"].values()} == {0.0}


def test_every_prompt_gets_room_for_its_worked_solution(tokenizer: Tokenizer) -> None:
    rooms: dict[bool, set[int]] = {True: set(), False: set()}
    model = oracle(tokenizer, ["word_problem"], 150)

    def generate(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        rooms["detailed thinking on" in tokenizer.decode(prompts[0])].add(max_new_tokens)
        assert len(prompts) <= 64
        return model(prompts, max_new_tokens)

    result = evaluate_tasks(generate, tokenizer, ["word_problem"], n=150, seed=1)
    assert result.accuracy["word_problem"]["on"]["accuracy"] == 1.0
    assert max(rooms[False]) < min(rooms[True])


def test_mistakes_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'maybe' is no thinking mode"):
        evaluate_tasks(lambda prompts, room: prompts, tokenizer, ["maximum"], ["maybe"])
    with pytest.raises(UserError, match="did you mean 'maximum'"):
        evaluate_tasks(lambda prompts, room: prompts, tokenizer, ["maximun"])
