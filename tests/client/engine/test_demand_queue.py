"""Threads take turns."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from farfault_client.engine.demand_queue import DemandQueue
from hypothesis import given
from hypothesis import strategies as st


def test_a_thread_with_many_pages_does_not_hold_up_the_others() -> None:
    queue = DemandQueue()
    for page in range(500):
        queue.add("greedy", page)
    queue.add("modest", 1000)
    queue.add("third", 2000)
    queue.add("third", 2001)
    taken = list(islice(queue.take(), 6))
    assert {1000, 2000, 2001} <= set(taken)
    assert len(queue) == 497


def test_turns_go_on_in_the_next_request() -> None:
    queue = DemandQueue()
    for key in range(8):
        for page in range(10):
            queue.add(key, key * 10 + page)
    shares: Counter[int] = Counter()
    for _ in range(4):
        shares.update(page // 10 for page in islice(queue.take(), 6))
    assert set(shares.values()) == {3}


def test_a_page_is_queued_once_a_thread() -> None:
    queue = DemandQueue()
    for _ in range(3):
        queue.add("a", 1)
    assert list(queue.take()) == [1]
    assert not queue


def test_pages_of_forgotten_threads_stay_and_do_not_pile_up() -> None:
    queue = DemandQueue()
    for attempt in range(100):
        queue.add("a", 1)
        queue.add("a", 2)
        queue.forget("a")
        assert len(queue) == 2, attempt
    queue.forget("nobody")
    assert sorted(queue.take()) == [1, 2]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20))))
def test_everything_comes_out(added: list[tuple[int, int]]) -> None:
    queue = DemandQueue()
    for key, page in added:
        queue.add(key, page)
    assert len(queue) == len(set(added))
    assert bool(queue) == bool(added)
    assert Counter(queue.take()) == Counter(page for _, page in set(added))
