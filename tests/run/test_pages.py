"""The page pool against a plain account of what is held by whom."""

from __future__ import annotations

import random

from sparseling.run.engine import PAGE
from sparseling.run.pages import PagePool, key_after


def filled(pool: PagePool, ids: list[int]) -> list[int]:
    """Pages of a text that was computed: all full pages are known."""
    pages = pool.find(ids)
    pages += pool.take(-(-len(ids) // PAGE) - len(pages))
    key = b""
    for n in range(len(ids) // PAGE):
        key = key_after(key, ids[n * PAGE:(n + 1) * PAGE])
        pool.know(pages[n], key)
    return pages


def test_a_known_beginning_is_shared_but_never_all_of_the_text() -> None:
    pool, ids = PagePool(10), list(range(3 * PAGE))
    first = filled(pool, ids)
    assert pool.available == 7
    assert pool.find(ids) == first[:2]                       # the last token is left to compute
    assert pool.find([*ids, 7]) == first
    assert pool.find([*ids[:-1], 99, 7]) == first[:2]
    assert pool.find([99, *ids]) == []
    assert pool.find(ids[:PAGE]) == []


def test_released_pages_are_found_until_they_are_needed() -> None:
    pool, ids = PagePool(4), list(range(2 * PAGE + 1))
    pages = filled(pool, ids)
    pool.release(pages)
    assert pool.available == 4 and pool.find(ids) == pages[:2]
    pool.release(pages[:2])
    assert len(set(pool.take(4))) == 4 and pool.find(ids) == []


def test_the_end_of_a_text_is_given_away_before_its_beginning_and_old_texts_before_new() -> None:
    pool = PagePool(4)
    old, new = list(range(2 * PAGE)), list(range(100, 100 + 2 * PAGE))
    for ids in (old, new):
        pool.release(filled(pool, ids))
    pool.take(1)
    assert len(pool.find([*old, 1])) == 1 and len(pool.find([*new, 1])) == 2


def test_a_page_with_two_holders_outlives_one() -> None:
    pool, ids = PagePool(2), list(range(PAGE + 1))
    first = filled(pool, ids)
    second = pool.find(ids)
    pool.release(first)
    assert second == first[:1] and pool.available == 1


def test_no_page_is_lost_or_given_twice_in_a_long_life() -> None:
    rng, pool, held = random.Random(4), PagePool(24), []
    for _ in range(3000):
        if held and rng.random() < 0.45:
            pool.release(held.pop(rng.randrange(len(held))))
        ids = [rng.randrange(2) for _ in range(rng.randrange(1, 5 * PAGE))] if rng.random() < 0.3 else [1] * rng.randrange(1, 5 * PAGE)
        if -(-len(ids) // PAGE) <= pool.available:
            held.append(filled(pool, ids))
        holders = [sum(page in pages for pages in held) for page in range(24)]
        assert holders == pool.holders
        assert sorted([*pool.free, *pool.kept]) == [page for page in range(24) if holders[page] == 0]
        assert set(pool.page_of.values()) == set(pool.key_of) and not set(pool.free) & set(pool.key_of)
