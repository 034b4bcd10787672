"""The data order: a bijection per epoch, exact shares in short runs, and no dependence on anything but (seed, index)."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter, defaultdict
from typing import Any

import pytest

from sparseling.data.mixture import Mixture, build_mixture, permute, shuffled
from sparseling.errors import UsageError, UserError

GROUPS: dict[str, Any] = {
    "general": {"share": 0.68, "domains": {"prose": 0.6, "tech": 0.3, "chat": 0.1}},
    "reasoning": {"share": 0.32, "domains": {"worked": 0.7, "math": 0.2, "code": 0.1}},
}
WINDOWS = {"prose": 97, "tech": 1000, "chat": 3, "worked": 64, "math": 17, "code": 1}


@pytest.fixture
def mixture() -> Mixture:
    return build_mixture(GROUPS, WINDOWS, seed=5)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 64, 65, 127, 1000, 4096, 5001])
def test_permute_is_a_bijection_for_every_size_and_key(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(value, size, key) for value in range(size)) == list(range(size))


def test_permute_handles_sizes_no_array_could() -> None:
    size = 10**15 + 37
    values = {permute(value, size, 3) for value in range(2000)}
    assert len(values) == 2000 and all(0 <= value < size for value in values)
    assert sum(value > size // 2 for value in values) == pytest.approx(1000, abs=120)


def test_permutations_look_random() -> None:
    """Chi-squared over (position of a value) for many keys, and hardly any fixed points or kept neighbours."""
    size, keys = 10, 4000
    landed = Counter(permute(0, size, key) for key in range(keys))
    assert sum((landed[value] - keys / size) ** 2 / (keys / size) for value in range(size)) < 33  # p = 0.0001 at 9 degrees
    order = [permute(value, 5000, 9) for value in range(5000)]
    assert sum(value == position for position, value in enumerate(order)) < 10
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 20


def test_each_epoch_visits_each_window_once_and_epochs_differ(mixture: Mixture) -> None:
    visits = defaultdict(list)
    for index in range(4000):
        domain, window = mixture.sample(index)
        visits[domain].append(window)
    assert set(visits) == set(WINDOWS)
    for domain, seen in visits.items():
        size = WINDOWS[domain]
        epochs = [seen[start : start + size] for start in range(0, len(seen) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs), domain
        assert len(set(seen[len(epochs) * size :])) == len(seen) % size
        if size > 50 and len(epochs) > 1:
            assert epochs[0] != epochs[1]


def test_shares_hold_in_every_window_of_a_few_dozen_samples(mixture: Mixture) -> None:
    names = [mixture.sample(index)[0] for index in range(5000)]
    shares = {domain.name: domain.share for domain in mixture.domains}
    assert shares == pytest.approx({"prose": 0.408, "tech": 0.204, "chat": 0.068, "worked": 0.224, "math": 0.064, "code": 0.032})
    reasoning = [name in GROUPS["reasoning"]["domains"] for name in names]
    for length in (24, 50, 333):
        for start in range(0, len(names) - length, 7):
            part = Counter(names[start : start + length])
            assert abs(sum(reasoning[start : start + length]) - 0.32 * length) < 2
            assert all(abs(part[name] - share * length) < 3.5 for name, share in shares.items())


def test_counts_equal_counting(mixture: Mixture) -> None:
    running: Counter[str] = Counter()
    for index in range(1500):
        assert mixture.counts(index) == {name: running[name] for name in WINDOWS}
        running[mixture.sample(index)[0]] += 1
    far = 10**12
    assert sum(mixture.counts(far).values()) == far
    assert mixture.counts(far)["worked"] == pytest.approx(0.224 * far, abs=5)


def test_order_does_not_depend_on_who_asks_or_when(mixture: Mixture) -> None:
    whole = [mixture.sample(index) for index in range(600)]
    source = random.Random(0)
    indices = list(range(600))
    source.shuffle(indices)
    fresh = build_mixture(GROUPS, WINDOWS, seed=5)
    assert {index: fresh.sample(index) for index in indices} == dict(enumerate(whole))
    for ranks in (2, 3, 8):
        by_rank = [[mixture.sample(index) for index in range(rank, 600, ranks)] for rank in range(ranks)]
        assert [by_rank[index % ranks][index // ranks] for index in range(600)] == whole


def test_order_is_the_same_in_another_process(mixture: Mixture) -> None:
    script = (
        "from sparseling.data.mixture import build_mixture\n"
        f"m = build_mixture({GROUPS!r}, {WINDOWS!r}, seed=5)\nprint([m.sample(i) for i in range(200)])"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == str([mixture.sample(index) for index in range(200)])


def test_the_seed_matters_and_other_domains_do_not_change_a_domains_order(mixture: Mixture) -> None:
    other = build_mixture(GROUPS, WINDOWS, seed=6)
    assert [other.sample(index) for index in range(50)] != [mixture.sample(index) for index in range(50)]
    alone = build_mixture({"general": {"share": 1, "domains": {"tech": 1}}}, WINDOWS, seed=5)
    in_mixture = [window for domain, window in map(mixture.sample, range(2000)) if domain == "tech"]
    assert [alone.sample(index)[1] for index in range(len(in_mixture))] == in_mixture


def test_the_next_stage_goes_on_with_windows_not_seen_yet(mixture: Mixture) -> None:
    drawn = mixture.drawn(700)
    later = build_mixture(
        {"general": {"share": 0.54, "domains": {"tech": 1}}, "reasoning": {"share": 0.46, "domains": {"worked": 1}}}, WINDOWS, 5, drawn
    )
    first = [window for domain, window in map(mixture.sample, range(700)) if domain == "tech"]
    second = [window for domain, window in map(later.sample, range(1000)) if domain == "tech"]
    assert drawn["tech"] == len(first) and not set(first) & set(second)
    assert later.epochs("tech", 1000) == (len(first) + len(second)) / 1000
    assert later.drawn(1000) == {"tech": len(first) + len(second), "worked": drawn["worked"] + 460}


def test_repeats_are_counted_and_warned_of(mixture: Mixture) -> None:
    assert mixture.epochs("prose", 1000) == pytest.approx(408 / 97, abs=0.03)
    warned = mixture.repeat_warnings(1000)
    assert [sentence.split(":")[0] for sentence in warned] == ["prose", "chat", "code"]  # the others: 0.2, 3.5 and 3.8 times
    assert "repeated 32.0 times" in warned[2]
    assert build_mixture(GROUPS, dict.fromkeys(WINDOWS, 10**6), 5).repeat_warnings(1000) == []
    with pytest.raises(UserError, match="did you mean 'prose'"):
        mixture.epochs("pros", 10)


def test_shuffled_walks_through_epochs() -> None:
    walk = [shuffled(index, 7, seed=1, name="rows") for index in range(21)]
    assert all(sorted(walk[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert len({tuple(walk[start : start + 7]) for start in (0, 7, 14)}) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general": {"share": 0.5, "domains": {"prose": 1}}}, "add up to 0.5"),
        ({}, "add up to 0"),
        ({"general": {"share": 1, "domain": {"prose": 1}}}, "mixture.general: needs `share` and `domains`"),
        ({"general": {"share": 1, "domains": {"prose": 1}, "shares": 2}}, "mixture.general.shares: unknown key; did you mean 'share'"),
        ({"general": {"share": 1, "domains": {"prosa": 1}}}, "prosa: there is no such domain in the data; did you mean 'prose'"),
        ({"general": {"share": 1, "domains": {"prose": 0}}}, "no domain has a weight"),
        ({"general": {"share": 1, "domains": {"prose": -1}}}, "is -1; give a number"),
        ({"general": {"share": True, "domains": {"prose": 1}}}, "share: is True"),
        ({"general": {"share": float("nan"), "domains": {"prose": 1}}}, "share: is nan"),
        ({"a": {"share": 0.5, "domains": {"prose": 1}}, "b": {"share": 0.5, "domains": {"prose": 1}}}, "also in another group"),
        ({"general": 3}, "mixture.general: needs"),
    ],
)
def test_a_wrong_recipe_is_answered_in_a_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        build_mixture(change, WINDOWS, 1)
    assert message in str(raised.value)


def test_a_domain_without_a_window_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"prose: has not one full window"):
        build_mixture({"general": {"share": 1, "domains": {"prose": 1}}}, {"prose": 0}, 1)
