"""The choice between all threads and one."""

from __future__ import annotations

from collections import Counter

import pytest

from sparseling.run.threads import FEW_ROWS, PROBE_SHARE, SAMPLES, ThreadChoice


def steps(choice: ThreadChoice, seconds: dict[int, float], count: int, rows: int = 1) -> tuple[Counter[int], float]:
    """How often each way was chosen, and all the time that it took."""
    chosen: Counter[int] = Counter()
    for _ in range(count):
        threads = choice.choose(rows)
        chosen[threads] += 1
        choice.learn(rows, threads, seconds[threads])
    return chosen, sum(chosen[threads] * seconds[threads] for threads in chosen)


@pytest.mark.parametrize("seconds", [{2: 1.0, 1: 1.7}, {2: 100.0, 1: 1.0}, {2: 1.0, 1: 1.01}])
def test_the_faster_way_is_taken_and_the_other_tried_for_a_small_share_of_the_time(seconds: dict[int, float]) -> None:
    choice = ThreadChoice(2)
    steps(choice, seconds, 2 * SAMPLES)
    chosen, total = steps(choice, seconds, 20_000)
    best = min(seconds, key=seconds.__getitem__)
    assert chosen.most_common(1)[0][0] == best
    other = 3 - best
    assert 0 < chosen[other] * seconds[other] <= 1.1 * PROBE_SHARE * total


def test_a_machine_that_changes_is_noticed() -> None:
    choice = ThreadChoice(2)
    steps(choice, {2: 1.0, 1: 1.7}, 1000)
    assert choice.choose(1) == 2
    steps(choice, {2: 100.0, 1: 1.7}, 10)  # another program came
    assert steps(choice, {2: 100.0, 1: 1.7}, 1000)[0].most_common(1)[0][0] == 1
    steps(choice, {2: 1.0, 1: 1.7}, 20_000)  # and went
    assert steps(choice, {2: 1.0, 1: 1.7}, 100)[0].most_common(1)[0][0] == 2


def test_single_threads_and_large_steps_have_no_choice() -> None:
    assert steps(ThreadChoice(1), {1: 1.0}, 50)[0] == {1: 50}
    assert steps(ThreadChoice(4), {4: 9.0, 1: 1.0}, 50, FEW_ROWS + 1)[0] == {4: 50}
