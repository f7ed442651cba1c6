"""In which order the background goes through memory."""

from __future__ import annotations

import farfault_client.engine.background_order as module
import pytest
from farfault_client.engine.background_order import CURSORS_MAX, RUNS_MAX, BackgroundOrder
from farfault_client.engine.page_map import PageMap
from farfault_client.engine.states import PageInput, Priority
from farfault_shim.layout import Layout, PageIndex, PageRun

PAGE, HUGE = 4096, 2 << 20
BATCH_PAGES = 8


class Memory:
    """Guest memory whose pages are asked for as they are chosen."""

    def __init__(self, page_count: int = 1024) -> None:
        self.pages = PageMap(page_count)
        self.order = BackgroundOrder(Layout([(page_count * PAGE, PAGE)]), self.pages)

    def next_first(self) -> int:
        return self.next_run().first

    def next_run(self) -> PageRun:
        (run,) = self.next_runs()
        return run

    def next_runs(self, priority: Priority = Priority.BACKGROUND) -> list[PageRun]:
        runs = []
        for run, found in self.order.next_runs(BATCH_PAGES * PAGE):
            assert found is priority
            self.pages.apply(*run, PageInput.SEND, found)
            runs.append(run)
        return runs


def test_upwards_and_round_until_nothing_is_left() -> None:
    memory = Memory(20)
    assert [memory.next_run() for _ in range(3)] == [(0, 8), (8, 8), (16, 4)]
    assert memory.next_runs() == []


def test_a_batch_goes_over_pages_that_came_by_demand() -> None:
    memory = Memory(40)
    for page in (2, 3, 6, 9):
        memory.pages.apply(page, 1, PageInput.INSTALL)
    assert memory.next_runs() == [(0, 2), (4, 2), (7, 2), (10, 2)]
    assert memory.next_runs() == [(12, 8)]


def test_runs_of_a_batch_are_bounded() -> None:
    memory = Memory(4 * RUNS_MAX)
    for page in range(0, 4 * RUNS_MAX, 2):
        memory.pages.apply(page, 1, PageInput.INSTALL)
    assert len([*memory.order.next_runs(4 * RUNS_MAX * PAGE)]) == RUNS_MAX


def test_a_batch_stays_in_its_region() -> None:
    layout = Layout([(4 * PAGE, PAGE), (2 * HUGE, HUGE)])
    pages = PageMap(layout.page_count)
    order = BackgroundOrder(layout, pages)
    assert [*order.next_runs(HUGE)] == [((0, 4), Priority.BACKGROUND)]
    pages.apply(0, 4, PageInput.SEND, Priority.BACKGROUND)
    assert [*order.next_runs(HUGE)] == [((4, 1), Priority.BACKGROUND)]


def test_scattered_hints_share_a_batch() -> None:
    memory = Memory()
    for page in (500, 7, 500, 300):
        memory.order.hint(PageRun(PageIndex(page), 1))
    memory.order.hint(PageRun(PageIndex(40), 20))
    assert memory.next_runs(Priority.HINT) == [(500, 1), (7, 1), (300, 1), (40, 5)]
    assert memory.next_runs(Priority.HINT) == [(45, 8)]


def test_hints_of_two_regions_do_not_share_a_batch() -> None:
    layout = Layout([(4 * PAGE, PAGE), (2 * HUGE, HUGE)])
    order = BackgroundOrder(layout, PageMap(layout.page_count))
    for page in (3, 4, 5):
        order.hint(PageRun(PageIndex(page), 1))
    assert [[*order.next_runs(2 * HUGE)] for _ in range(2)] == [
        [((3, 1), Priority.HINT)],
        [((4, 1), Priority.HINT), ((5, 1), Priority.HINT)],
    ]


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
    assert memory.next_runs(Priority.HINT) == [(500, 2)]


def test_hints_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HINT_RUNS_MAX", 2)
    order = Memory().order
    assert [order.hint(PageRun(PageIndex(page), 1)) for page in range(3)] == [True, True, False]
