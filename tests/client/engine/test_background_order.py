"""In which order the background goes through memory."""

from __future__ import annotations

import farfault_client.engine.background_order as module
import pytest
from farfault_client.engine.background_order import CURSORS_MAX, BackgroundOrder
from farfault_client.engine.page_map import PageMap
from farfault_client.engine.states import PageInput, Priority
from farfault_shim.layout import Layout, PageIndex, PageRun

PAGE = 4096
BATCH_PAGES = 8


class Memory:
    """Guest memory whose pages are asked for as they are chosen."""

    def __init__(self, page_count: int = 1024) -> None:
        self.pages = PageMap(page_count)
        self.order = BackgroundOrder(Layout([(page_count * PAGE, PAGE)]), self.pages)

    def next_first(self) -> int:
        return self.next_run().first

    def next_run(self) -> PageRun:
        found = self.order.next_run(BATCH_PAGES * PAGE)
        assert found is not None
        run, priority = found
        self.pages.apply(*run, PageInput.SEND, priority)
        return run


def test_upwards_and_round_until_nothing_is_left() -> None:
    memory = Memory(20)
    assert [memory.next_run() for _ in range(3)] == [(0, 8), (8, 8), (16, 4)]
    assert memory.order.next_run(PAGE) is None


def test_it_goes_on_where_the_guest_goes_and_comes_round_to_the_rest() -> None:
    memory = Memory(40)
    assert memory.next_first() == 0
    memory.order.follow(24, 16)
    assert [memory.next_first() for _ in range(4)] == [24, 32, 8, 16]


def test_a_guest_that_is_on_its_way_already_changes_nothing() -> None:
    memory = Memory()
    memory.order.follow(100, 64)
    assert memory.next_first() == 100
    memory.order.follow(102, 64)
    assert [memory.next_first() for _ in range(2)] == [108, 116]


def test_a_guest_that_got_ahead_is_caught_up_with() -> None:
    memory = Memory()
    memory.order.follow(100, 64)
    memory.order.follow(150, 64)
    assert [memory.next_first() for _ in range(2)] == [150, 158]


def test_several_guests_take_turns() -> None:
    memory = Memory()
    for page in (100, 300, 500):
        memory.order.follow(page, 64)
    assert sorted(memory.next_first() for _ in range(3)) == [100, 300, 500]
    assert sorted(memory.next_first() for _ in range(3)) == [108, 308, 508]


def test_places_are_bounded() -> None:
    memory = Memory()
    for index in range(CURSORS_MAX + 2):
        memory.order.follow(index * 100, 64)
    firsts = {memory.next_first() for _ in range(CURSORS_MAX)}
    assert firsts == {index * 100 for index in range(2, CURSORS_MAX + 2)}


def test_hints_come_before_the_guest_s_way() -> None:
    memory = Memory()
    memory.order.follow(100, 64)
    assert memory.order.hint(PageRun(PageIndex(500), 2))
    found = memory.order.next_run(BATCH_PAGES * PAGE)
    assert found == ((500, 2), Priority.HINT)


def test_hints_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HINT_RUNS_MAX", 2)
    order = Memory().order
    assert [order.hint(PageRun(PageIndex(page), 1)) for page in range(3)] == [True, True, False]
