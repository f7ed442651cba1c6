"""Threads and pages, found either way."""

from __future__ import annotations

from farfault_client.engine.states import Priority
from farfault_client.engine.waiters import Waiter, Waiters
from farfault_shim.layout import PageIndex, PageRun


def _add(waiters: Waiters, key: str, *pages: int, priority: Priority = Priority.VCPU) -> None:
    indices = tuple(PageIndex(page) for page in pages)
    waiters.add(Waiter(key, priority, 0.0, indices), set(indices))


def _keys(woken: list[Waiter]) -> list[object]:
    return [waiter.key for waiter in woken]


def test_a_thread_wakes_when_its_last_page_is_there() -> None:
    waiters = Waiters()
    _add(waiters, "a", 1, 2)
    _add(waiters, "b", 2)
    assert _keys(waiters.wake([2])) == ["b"]
    assert len(waiters) == 1
    assert "a" in waiters
    assert _keys(waiters.wake([1])) == ["a"]
    assert waiters.all() == []


def test_awaited_pages_of_a_run() -> None:
    waiters = Waiters()
    assert waiters.awaited(PageRun(PageIndex(0), 10)) == []
    _add(waiters, "a", 9, 3, 5)
    _add(waiters, "b", 3)
    for count in (1, 2, 3, 100):
        run = PageRun(PageIndex(3), count)
        assert waiters.awaited(run) == [page for page in (3, 5, 9) if page < run.end]
    assert waiters.awaited(PageRun(PageIndex(4), 1)) == []


def test_a_forgotten_thread_is_not_woken() -> None:
    waiters = Waiters()
    _add(waiters, "a", 1, 2)
    _add(waiters, "b", 1)
    forgotten = waiters.forget("a")
    assert forgotten is not None
    assert forgotten.pages == (1, 2)
    assert waiters.forget("a") is None
    assert waiters.awaited(PageRun(PageIndex(0), 9)) == [1]
    assert _keys(waiters.wake([1])) == ["b"]


def test_the_most_urgent_thread_of_a_page() -> None:
    waiters = Waiters()
    assert waiters.of_page(1) is None
    _add(waiters, "vmm", 1, priority=Priority.VMM)
    _add(waiters, "vcpu", 1)
    found = waiters.of_page(1)
    assert found is not None
    assert found.key == "vcpu"
