"""Generated problems: right answers, consistent steps, a strict split by prompt, even coverage, determinism."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable

import pytest

from sparseling.errors import UserError
from sparseling.study.tasks import (
    FAMILIES,
    LAPTOP,
    Problem,
    constant_baseline,
    conversations,
    evaluation_problems,
    family,
    is_held_out,
    training_problem,
    validation_problem,
    worked_documents,
)
from sparseling.study.tasks.corpus import LAYOUTS
from sparseling.study.tasks.small_talk import EXCHANGES


def numbers(prompt: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", prompt)]


def letters(prompt: str) -> list[str]:
    """The last run of single letters in a prompt."""
    return re.findall(r"(?:\b[a-z] )+[a-z]\b", prompt)[-1].split()


def solve_word_problem(prompt: str) -> int:
    start, first, second = numbers(prompt)
    signs = [1 if word in ("finds", "buys", "gets") else -1 for word in re.findall(r"finds|buys|gets|gives|loses|sells", prompt)]
    assert sorted(signs) == [-1, 1]
    return start + signs[0] * first + signs[1] * second


def solve_difference(prompt: str) -> int:
    first, second = numbers(prompt)
    return second - first if prompt.startswith(("Subtract", "Take")) and "from" in prompt else abs(first - second)


def letter_and_list(prompt: str) -> tuple[str, list[str]]:
    asked = re.search(r"(?:is|letter|does) ([a-z]) ", prompt)
    assert asked
    return asked[1], letters(prompt.split(" among ")[-1].split(" in ")[-1])


def solve_count(prompt: str) -> int:
    letter, listed = letter_and_list(prompt)
    return listed.count(letter)


# Each answer again, from the words of the prompt alone.
SOLVERS: dict[str, Callable[[str], object]] = {
    "two_digit_addition": lambda prompt: sum(numbers(prompt)),
    "two_digit_subtraction": solve_difference,
    "three_digit_subtraction": solve_difference,
    "multiplication": lambda prompt: numbers(prompt)[0] * numbers(prompt)[1],
    "sequence": lambda prompt: 2 * numbers(prompt)[-1] - numbers(prompt)[-2],
    "maximum": lambda prompt: max(numbers(prompt)),
    "sort_numbers": lambda prompt: " ".join(map(str, sorted(numbers(prompt)))),
    "sort_letters": lambda prompt: " ".join(sorted(letters(prompt))),
    "reverse_letters": lambda prompt: " ".join(reversed(letters(prompt))),
    "count_letter": solve_count,
    "gain_problem": lambda prompt: sum(numbers(prompt)),
    "word_problem": solve_word_problem,
}


def problems(task: str, n: int = 800) -> list[Problem]:
    return [family(task).problem(11, index) for index in range(n)]


@pytest.mark.parametrize("task", FAMILIES)
def test_answers_are_right(task: str) -> None:
    for problem in problems(task):
        assert problem.task == task
        assert problem.answer == str(SOLVERS[task](problem.prompt)), problem.prompt


def check_equations(problem: Problem) -> int:
    """Every `expression=value` in the steps holds, and every carry and borrow is the one that its line implies."""
    found = 0
    for line in problem.steps:
        for left, right in re.findall(r"([\d+*-]+)=(\d+)", line):
            found += 1
            assert eval(left) == int(right), line
        carry = re.search(r"=(\d+) carry (\d)", line)
        assert carry is None or int(carry[1]) // 10 == int(carry[2]), line
        borrow = re.search(r"(\d+)-[\d-]+=\d+ borrow (\d)", line)
        assert borrow is None or int(borrow[1]) // 10 == int(borrow[2]), line
    return found


@pytest.mark.parametrize("task", ["two_digit_addition", "two_digit_subtraction", "three_digit_subtraction", "multiplication"])
def test_columns_follow_from_the_operands(task: str) -> None:
    """The written columns use the operands' digits and the last carry, and the answer can be read off the lines."""
    for problem in problems(task):
        a, _, b = re.fullmatch(r"(\d+)([+*-])(\d+)", problem.steps[0]).groups()  # type: ignore[union-attr]
        assert sorted(numbers(problem.prompt)) == sorted((int(a), int(b)))
        assert check_equations(problem) >= 2
        carried, digits = None, ""
        for place, line in enumerate(problem.steps[1:], start=1):
            first = re.match(r"[a-z]+ (\d+)[+*-](\d)", line)
            assert first and first[1][-1] == a[-place] and first[2] == (b if task == "multiplication" else b[-place])
            if carried is not None:
                assert re.search(rf"[+-]{carried}=", line)
            carried = (re.findall(r"(?:carry|borrow) (\d)", line) or [None])[0]
            value = re.findall(r"=(\d+)", line)[-1]
            digits = (value[-1] if place < len(problem.steps) - 1 else value) + digits
        assert str(int(digits)) == problem.answer


def test_word_problems_and_sequences_are_worked_through() -> None:
    for problem in problems("word_problem"):
        assert check_equations(problem) == 4
        first, second = problem.steps[0], problem.steps[3]
        assert eval(first) == int(re.match(r"\d+", second)[0]) and str(eval(second)) == problem.answer  # type: ignore[index]
        assert int(re.match(r"\d+", first)[0]) == numbers(problem.prompt)[0]  # type: ignore[index]
    for problem in problems("sequence"):
        assert check_equations(problem) == 2 and str(eval(problem.steps[1])) == problem.answer
        shown, step = numbers(problem.prompt), numbers(problem.steps[0])
        assert step[0] + step[2] == step[1] and {b - a for a, b in itertools.pairwise(shown)} == {step[2]}


def test_lists_are_worked_through() -> None:
    for problem in problems("maximum"):
        shown, best = numbers(problem.prompt), numbers(problem.prompt)[0]
        for item, line in zip(shown[1:], problem.steps, strict=True):
            assert numbers(line) == [best, item, max(best, item)]
            best = max(best, item)
        assert str(best) == problem.answer
    for task, word in (("sort_letters", "first"), ("sort_numbers", "min")):
        for problem in problems(task):
            rest, taken = problem.steps[0].split()[1:], []
            for line in problem.steps[1:]:
                head, _, tail = line.partition(" rest ")
                item = head.removeprefix(word + " ")
                assert item == min(rest)
                rest = [other for other in rest if other != item]
                assert tail.split() == rest
                taken.append(item)
            assert not rest and " ".join(taken) == problem.answer
    for problem in problems("reverse_letters"):
        up, down = (re.findall(r"(\d) ([a-z])", line) for line in problem.steps)
        assert [letter for _, letter in up] == letters(problem.prompt) and up == down[::-1]
        assert [int(place) for place, _ in up] == list(range(1, len(up) + 1))
    for problem in problems("count_letter"):
        walk, target = re.findall(r"([a-z]) (\d)", problem.steps[1]), problem.steps[0][-1]
        for place, (_, count) in enumerate(walk, start=1):
            assert int(count) == sum(letter == target for letter, _ in walk[:place])
        assert walk[-1][1] == problem.answer


def asked_of(task: str, prompt: str) -> object:
    """What a prompt asks, whatever its wording: found by reading the prompt, not by asking the generator."""
    if task in ("two_digit_addition", "gain_problem", "maximum", "sort_numbers"):
        return tuple(sorted(numbers(prompt)))
    if task == "sort_letters":
        return tuple(sorted(letters(prompt)))
    if task == "count_letter":
        letter, listed = letter_and_list(prompt)
        return (letter, *listed)
    return (SOLVERS[task](prompt), *numbers(prompt)) if numbers(prompt) else tuple(letters(prompt))


@functools.cache
def held_out_sums() -> set[object]:
    """Every held-out sum (all but a few rare ones), as unordered operands."""
    return {asked_of("two_digit_addition", problem.prompt) for problem in evaluation_problems("two_digit_addition", 10_000, seed=1)}


@pytest.mark.parametrize("task", FAMILIES)
def test_held_out_problems_never_occur_in_training(task: str) -> None:
    held_out = {asked_of(task, problem.prompt) for problem in evaluation_problems(task, 60, seed=5)}
    trained = {asked_of(task, training_problem(task, seed, index).prompt) for seed in (0, 5) for index in range(1000)}
    validation = {asked_of(task, validation_problem(task, 5, index).prompt) for index in range(60)}
    assert held_out and not held_out & trained and validation and not validation & (trained | held_out)


def test_held_out_sums_never_occur_in_20000_training_samples() -> None:
    held_out = held_out_sums()
    every_pair = {(a, b) for a in range(10, 100) for b in range(a, 100)}
    stream = [asked_of("two_digit_addition", training_problem("two_digit_addition", 1, index).prompt) for index in range(20_000)]
    assert not held_out & set(stream)
    assert 0.08 < len(held_out) / len(every_pair) < 0.12
    validation = {asked_of("two_digit_addition", validation_problem("two_digit_addition", 1, index).prompt) for index in range(2000)}
    assert 0.03 < len(validation) / len(every_pair) < 0.06
    assert len(every_pair - held_out - validation - set(stream)) < 0.03 * len(every_pair)  # what is not held out is trained


def test_held_out_sums_never_occur_in_any_training_text() -> None:
    """Nor inside the steps of other families: every `a+b` of two-digit numbers in documents and conversations is allowed."""
    held_out = held_out_sums()
    documents = worked_documents(list(FAMILIES), seed=2)
    texts = [next(documents)[1] for _ in range(800)]
    for conversation in conversations(list(FAMILIES), seed=2, n=2000, thinking_share=1.0):
        texts += [message.content + "\n" + (message.reasoning_content or "") for message in conversation.messages]
    sums = [
        tuple(sorted(map(int, pair)))
        for text in texts
        for pair in re.findall(r"(?<!\d)([1-9]\d)(?: ?\+ ?| and | plus | [a-z]+ and (?:gets|then) | [a-z]+ here and )([1-9]\d)(?!\d)", text)
    ]
    assert len(sums) > 800 and not held_out & set(sums)


def test_the_split_ignores_wording_order_and_seed() -> None:
    by_content: dict[tuple[int, ...], set[bool]] = {}
    for seed in (1, 2, 3):
        for index in range(4000):
            problem = family("two_digit_addition").problem(seed, index)
            by_content.setdefault(tuple(sorted(numbers(problem.prompt))), set()).add(is_held_out(problem))
    assert all(len(verdicts) == 1 for verdicts in by_content.values())
    wordings = {re.sub(r"\d+", "#", problem.prompt) for problem in problems("two_digit_addition")}
    assert len(wordings) == 5


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_share_of_held_out(share: float) -> None:
    drawn = problems("sort_letters", 3000)
    assert abs(sum(is_held_out(problem, share) for problem in drawn) / len(drawn) - share) < 0.03


def test_a_larger_share_holds_out_more_of_the_same() -> None:
    for problem in problems("maximum", 2000):
        assert is_held_out(problem, 0.3) or not is_held_out(problem, 0.1)


def test_operands_are_drawn_evenly() -> None:
    """Chi-square over the digits of both operands and the wordings, at four standard deviations."""
    drawn = [family("two_digit_addition").problem(3, index) for index in range(9_000)]
    pairs = [numbers(problem.prompt) for problem in drawn]
    columns: dict[str, tuple[list[object], int]] = {
        "tens": ([pair[side] // 10 for pair in pairs for side in (0, 1)], 9),
        "ones": ([pair[side] % 10 for pair in pairs for side in (0, 1)], 10),
        "both tens": ([(pair[0] // 10, pair[1] // 10) for pair in pairs], 81),
        "both ones": ([(pair[0] % 10, pair[1] % 10) for pair in pairs], 100),
        "wording": ([re.sub(r"\d+", "#", problem.prompt) for problem in drawn], 5),
    }
    for name, (values, kinds) in columns.items():
        expected = len(values) / kinds
        counts = Counter(values)
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
        assert len(counts) == kinds and chi_square < kinds - 1 + 4 * (2 * (kinds - 1)) ** 0.5, name


@pytest.mark.parametrize("task", FAMILIES)
def test_every_family_has_several_wordings(task: str) -> None:
    stems = {re.sub(r"\d+|\b[a-z]\b", "#", problem.prompt).split("#")[0] for problem in problems(task)}
    assert len(stems) >= 3


def test_evaluation_problems_are_held_out_and_all_different() -> None:
    found = evaluation_problems("two_digit_addition", 200, seed=9)
    assert len(found) == 200 and all(is_held_out(problem) for problem in found)
    assert len({asked_of("two_digit_addition", problem.prompt) for problem in found}) == 200
    assert evaluation_problems("two_digit_addition", 50, seed=9) == found[:50]
    assert 40 < len(evaluation_problems("multiplication", 10_000, seed=0)) < 100  # the whole held-out part: 720 exist


def test_constant_answers_score_low_on_the_laptop_tasks() -> None:
    for task in LAPTOP:
        held_out = evaluation_problems(task, 200, seed=0)
        best = max(sum(p.answer == answer for p in held_out) for answer in {p.answer for p in held_out}) / 200
        assert constant_baseline(held_out) == best < 0.1


def test_streams_are_pure_functions_in_every_process() -> None:
    code = (
        "from sparseling.study.tasks import *\n"
        "d = worked_documents(sorted(FAMILIES), 4)\n"
        "print([training_problem(t, 4, 17) for t in sorted(FAMILIES)], next(d), next(d), list(conversations(LAPTOP, 4, 9)))"
    )
    documents = worked_documents(sorted(FAMILIES), 4)
    here = [training_problem(task, 4, 17) for task in sorted(FAMILIES)], next(documents), next(documents), list(conversations(LAPTOP, 4, 9))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}).stdout
    assert out.strip() == " ".join(str(part) for part in here)


def test_worked_documents_hold_whole_solutions() -> None:
    documents = worked_documents(LAPTOP, seed=1)
    texts = dict(next(documents) for _ in range(300))
    assert len(texts) == 300 and len(set(texts.values())) == 300
    blocks = [text.rstrip("\n") for text in texts.values()]
    assert not any("\n\n" in block for block in blocks)  # one problem a document
    worked = sum(bool(re.search(r"^(tens|first|\d+ \d+ max|1 [a-z] 2) ", block, re.MULTILINE)) for block in blocks)
    assert 0.85 < worked / len(blocks) < 0.95
    layouts = {block.split("\n")[0].split(" ")[0] for block in blocks}
    assert {"Question:", "Q:", "Problem:"} <= layouts and len(LAYOUTS) == 4
    for block in blocks:
        if "Add" in block.split("\n")[0]:
            assert numbers(block)[-1] == sum(numbers(block.split("\n")[0]))


def test_conversations_come_in_both_modes() -> None:
    drawn = list(conversations(LAPTOP, seed=1, n=4000, thinking_share=0.7, talk_share=0.05))
    assert abs(sum(conversation.thinking for conversation in drawn) / 4000 - 0.7) < 0.03
    talk = {answer for _, _, answer in EXCHANGES}
    assert abs(sum(conversation.messages[1].content in talk for conversation in drawn) / 4000 - 0.05) < 0.015
    for conversation in drawn:
        ask, reply = conversation.messages
        assert (ask.role, reply.role) == ("user", "assistant")
        assert bool(reply.reasoning_content) == conversation.thinking and "\n" not in reply.content
    assert any("sparseling" in conversation.messages[1].content for conversation in drawn)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="no task 'two_digit_adition'; did you mean 'two_digit_addition'"):
        worked_documents(["two_digit_adition"], seed=0)
    with pytest.raises(UserError, match="leaves nothing"):
        training_problem("maximum", 0, 0, held_out_share=1.0)
    with pytest.raises(UserError, match="holds out no problem"):
        evaluation_problems("maximum", 5, 0, held_out_share=0.0)
