"""Training text from the families: plain worked documents for pre-training, conversations in both thinking modes for fine-tuning."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from ...align.chat import Message
from ...align.conversations import Conversation
from .families import family, training_problem
from .problem import HELD_OUT_SHARE, Problem
from .small_talk import EXCHANGES

ProblemAt = Callable[[str, int, int], Problem]  # (task, seed, index) -> problem; a pure function
# (with steps, without steps); "{steps}" are lines
LAYOUTS = (
    ("Question: {prompt}\nSolution:\n{steps}\nAnswer: {answer}\n", "Question: {prompt}\nAnswer: {answer}\n"),
    ("{prompt}\n{steps}\nAnswer: {answer}\n", "{prompt}\nAnswer: {answer}\n"),
    ("Q: {prompt}\nA:\n{steps}\nThe answer is {answer}\n", "Q: {prompt}\nA: {answer}\n"),
    ("Problem: {prompt}\nSteps:\n{steps}\nResult: {answer}\n", "Problem: {prompt}\nResult: {answer}\n"),
)


def worked_documents(
    families: Sequence[str], seed: int, steps_share: float = 0.9, problem: ProblemAt = training_problem
) -> Iterator[tuple[str, str]]:
    """Endless (id, text) of worked solutions for pre-training; document i is a pure function of (seed, i).

    `steps_share` of the problems show their steps, the others their answer alone. `problem` is the stream they are of
    (`training_problem` or `validation_problem`).
    """
    for name in families:
        family(name)  # an unknown name is an error now, not at the first document
    return ((f"worked-{seed}-{index}", worked_document(families, seed, index, steps_share, problem)) for index in itertools.count())


def worked_document(families: Sequence[str], seed: int, index: int, steps_share: float, problem: ProblemAt) -> str:
    """One problem, laid out. One alone: a small model learns to copy its operands far sooner where no other problem distracts it."""
    rng = random.Random(f"document/{seed}/{index}")
    with_steps, without = rng.choice(LAYOUTS)
    chosen = problem(rng.choice(families), seed, index)
    layout = with_steps if rng.random() < steps_share else without
    return layout.format(prompt=chosen.prompt, steps="\n".join(chosen.steps), answer=chosen.answer)


def conversations(
    families: Sequence[str],
    seed: int,
    n: int,
    thinking_share: float = 0.5,
    talk_share: float = 0.02,
    held_out_share: float = HELD_OUT_SHARE,
) -> Iterator[Conversation]:
    """`n` conversations for decoupled fine-tuning (Ling 2.0 report, section 4.1); conversation i is a pure function of (seed, i).

    `thinking_share` of them think: the steps are the reasoning and the answer stands alone; the others give the short answer at
    once. `talk_share` of them are small talk.
    """
    return (conversation(families, seed, index, thinking_share, talk_share, held_out_share) for index in range(n))


def conversation(
    families: Sequence[str],
    seed: int,
    index: int,
    thinking_share: float = 0.5,
    talk_share: float = 0.02,
    held_out_share: float = HELD_OUT_SHARE,
) -> Conversation:
    """Conversation `index` of `conversations`."""
    rng = random.Random(f"conversation/{seed}/{index}")
    thinking = rng.random() < thinking_share
    if rng.random() < talk_share:
        questions, reasoning, answer = rng.choice(EXCHANGES)
        prompt = rng.choice(questions)
    else:
        problem = training_problem(rng.choice(families), seed, index, held_out_share)
        prompt, reasoning, answer = problem.prompt, "\n".join(problem.steps), problem.answer
    reply = Message("assistant", answer, reasoning if thinking else None)
    return Conversation((Message("user", prompt), reply), thinking)
