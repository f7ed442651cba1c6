"""The engine's promises, one by one."""

from __future__ import annotations

import pytest
from farfault_client.engine import (
    EngineConfig,
    Extent,
    ExtentResult,
    FaultEngine,
    Fetch,
    Install,
    PageState,
    Priority,
    Waiter,
)
from farfault_client.engine import engine as module
from farfault_client.engine.background_order import RUNS_MAX
from farfault_client.engine.neighbours import DEPTH_MAX_PAGES
from farfault_shim.layout import Layout, PageIndex, PageRun

PAGE, HUGE, GIANT = 4096, 2 << 20, 1 << 30
DATA, ZERO, REFUSED = ExtentResult.DATA, ExtentResult.ZERO, ExtentResult.REFUSED
VCPU, VMM = Priority.VCPU, Priority.VMM


def run(first: int, count: int = 1) -> PageRun:
    return PageRun(PageIndex(first), count)


def engine_of(*sizes: tuple[int, int], **config: int) -> FaultEngine:
    return FaultEngine(Layout(sizes or [(1024 * PAGE, PAGE)]), EngineConfig(**config))


def fault(engine: FaultEngine, key: object, *pages: int, priority: Priority = VCPU, now: float = 0.0) -> bool:
    return engine.fault(key, [PageIndex(page) for page in pages], priority, now).ready


def demand(engine: FaultEngine) -> Fetch:
    fetch = engine.next_demand()
    assert fetch is not None
    return fetch


def answer(engine: FaultEngine, fetch: Fetch, result: ExtentResult = DATA, now: float = 0.0) -> list[object]:
    """Answers a request in full and installs it; the keys that woke."""
    woken: list[Waiter] = []
    for order in engine.arrived([Extent(part, result) for part in fetch.runs], [fetch.request_id], now):
        woken += engine.installed(order.run, zero=order.data_offset < 0)
    return [waiter.key for waiter in woken]


# ---- demand --------------------------------------------------------------------------------------


def test_faults_that_wait_now_travel_in_one_request() -> None:
    engine = engine_of()
    fault(engine, "a", 7)
    fault(engine, "b", 8)
    fault(engine, "c", 100, priority=VMM)
    fault(engine, "d", 3)
    fetch = demand(engine)
    assert fetch.runs == (run(3), run(7, 2), run(100)), "vCPUs first"
    assert (fetch.priority, fetch.size_bytes) == (VCPU, 4 * PAGE)
    assert engine.next_demand() is None
    assert answer(engine, fetch) == ["d", "a", "b", "c"]


def test_two_faults_on_one_page_are_fetched_once_and_both_wake() -> None:
    engine = engine_of()
    fault(engine, "a", 5)
    fault(engine, "b", 5)
    fetch = demand(engine)
    fault(engine, "c", 5)
    assert engine.next_demand() is None
    assert engine.stats.faults_on_flight == 1
    assert answer(engine, fetch) == ["a", "b", "c"]


def test_a_fault_on_a_present_page_is_ready_at_once() -> None:
    engine = engine_of()
    engine.present(run(5))
    assert fault(engine, "a", 5)
    assert engine.stats.faults_on_present == 1
    assert engine.next_demand() is None


def test_a_range_waits_for_all_of_its_pages() -> None:
    engine = engine_of()
    engine.present(run(5))
    fault(engine, "a", 4, 5, 6)
    fetch = demand(engine)
    assert fetch.runs == (run(4), run(6))
    orders = engine.arrived([Extent(part, DATA) for part in fetch.runs], [fetch.request_id], 0.0)
    assert orders == [Install(run(4), 0), Install(run(6), PAGE)]
    assert engine.installed(run(4)) == []
    assert [waiter.key for waiter in engine.installed(run(6))] == ["a"]


def test_a_full_request_takes_turns_between_vcpus() -> None:
    engine = engine_of(demand_pages_max=8)
    fault(engine, "greedy", *range(100, 400))
    fault(engine, "modest", 7)
    fault(engine, "third", 9, 10)
    fetch = demand(engine)
    pages = {page for part in fetch.runs for page in range(part.first, part.end)}
    assert {7, 9, 10} <= pages
    assert len(pages) == 8
    assert len({page for part in demand(engine).runs for page in range(part.first, part.end)}) == 8


def test_requests_are_bounded_by_bytes_where_pages_are_large() -> None:
    engine = engine_of((64 * HUGE, HUGE))
    fault(engine, "a", *range(10))
    assert demand(engine).size_bytes == HUGE
    engine = engine_of((64 * PAGE, PAGE), (64 * HUGE, HUGE))
    fault(engine, "a", 0, 1, 64, 65)
    assert demand(engine).size_bytes <= engine.config.demand_bytes_max + HUGE


def test_several_requests_are_in_flight_for_several_streams() -> None:
    engine = engine_of()
    fault(engine, "a", 1)
    first = demand(engine)
    fault(engine, "b", 2)
    second = demand(engine)
    assert first.request_id != second.request_id
    assert engine.requests_in_flight == 2
    assert answer(engine, second) == ["b"], "in any order"
    assert answer(engine, first) == ["a"]


def test_a_raise_moves_a_queued_page_forward() -> None:
    engine = engine_of(demand_pages_max=1)
    fault(engine, "vmm", 1, priority=VMM)
    fault(engine, "other", 2, priority=VMM)
    fault(engine, "vcpu", 2)
    assert demand(engine).runs == (run(2),)
    assert demand(engine).runs == (run(1),)
    assert engine.next_demand() is None


def test_a_second_fault_of_a_key_replaces_the_first() -> None:
    engine = engine_of()
    fault(engine, "a", 1)
    fault(engine, "a", 2)
    fetch = demand(engine)
    assert fetch.runs == (run(1, 2),), "what was asked for is fetched all the same"
    assert answer(engine, fetch) == ["a"]


def test_a_kicked_vcpu_is_not_woken_and_finds_its_page_later() -> None:
    engine = engine_of()
    fault(engine, "a", 1)
    engine.forget("a")
    assert engine.waiting == []
    assert answer(engine, demand(engine)) == []
    assert fault(engine, "a", 1)


def test_waiters_are_bounded() -> None:
    engine = engine_of(waiters_max=2)
    fault(engine, "a", 1)
    fault(engine, "b", 2)
    fault(engine, "b", 3)
    with pytest.raises(OverflowError, match="more than 2 threads"):
        fault(engine, "c", 4)


# ---- answers -------------------------------------------------------------------------------------


def test_an_answer_is_clipped_to_what_is_wanted() -> None:
    engine = engine_of()
    fault(engine, "a", 10, 11, 12, 13)
    fetch = demand(engine)
    engine.removed(run(11))
    engine.installed(run(12), existed=True)
    orders = engine.arrived([Extent(run(8, 8), DATA)], [fetch.request_id], 0.0)
    assert orders == [Install(run(10), 2 * PAGE), Install(run(13), 5 * PAGE)]
    assert engine.stats.clipped_pages == 6


def test_an_answer_that_brings_a_page_twice_installs_it_once() -> None:
    engine = engine_of()
    fault(engine, "a", 10)
    fetch = demand(engine)
    extents = [Extent(run(10), DATA), Extent(run(10), DATA), Extent(run(10), ZERO), Extent(run(10), REFUSED)]
    assert engine.arrived(extents, [fetch.request_id], 0.0) == [Install(run(10), 0)]
    assert engine.pages.state(10) is PageState.ARRIVED


def test_zero_pages_stay_holes_unless_somebody_waits() -> None:
    engine = engine_of((16 * PAGE, PAGE))
    fetch = engine.next_background(0.0)
    assert fetch is not None
    fault(engine, "a", 5)
    orders = engine.arrived([Extent(run(0, 16), ZERO)], [fetch.request_id], 0.0)
    assert orders == [Install(run(5), -1)]
    engine.installed(run(5), zero=True)
    assert engine.finished
    assert engine.stats.zero_pages == 16
    assert engine.pages.total(PageState.REMOVED) == 15


def test_a_request_that_is_done_without_all_its_pages_is_asked_again_for_the_rest() -> None:
    engine = engine_of()
    fault(engine, "a", 1, 2, 3)
    fetch = demand(engine)
    for order in engine.arrived([Extent(run(2), DATA)], [fetch.request_id], 0.0):
        engine.installed(order.run)
    assert engine.demand_waits
    again = demand(engine)
    assert again.runs == (run(1), run(3))
    assert answer(engine, again) == ["a"]


def test_a_refused_background_page_is_asked_for_after_a_pause() -> None:
    engine = engine_of((4 * PAGE, PAGE))
    fetch = engine.next_background(1.0)
    assert fetch is not None
    answer(engine, fetch, REFUSED, 1.0)
    assert engine.stats.refused_pages == 4
    assert engine.next_background(1.0 + module.REFUSAL_PAUSE_S / 2) is None
    assert engine.next_background(1.0 + module.REFUSAL_PAUSE_S) is not None


def test_lost_requests_are_asked_for_again_at_their_raised_priority() -> None:
    engine = engine_of((64 * PAGE, PAGE))
    fetch = engine.next_background(0.0)
    assert fetch is not None
    fault(engine, "a", 9, now=0.001)
    assert engine.next_demand() is None, "one fetch in flight"
    engine.lost([fetch.request_id])
    again = demand(engine)
    assert (again.runs, again.priority) == ((run(9),), VCPU)
    assert engine.background_in_flight_bytes == 0
    engine.lost([fetch.request_id, 12345])
    assert answer(engine, again) == ["a"]


def test_losing_everything_loses_every_lane() -> None:
    engine = engine_of((64 * PAGE, PAGE), batch_bytes_max=4 * PAGE)
    fault(engine, "a", 60)
    demand(engine)
    engine.next_background(1.0)
    engine.lost()
    assert engine.requests_in_flight == 0
    assert engine.stats.lost_pages == 5
    assert demand(engine).runs == (run(60),)


def test_pages_that_could_not_be_installed_are_fetched_again() -> None:
    engine = engine_of()
    fault(engine, "a", 1, 2)
    fetch = demand(engine)
    (order,) = engine.arrived([Extent(run(1, 2), DATA)], [fetch.request_id], 0.0)
    engine.installed(run(1))
    engine.not_installed(order.run)
    assert demand(engine).runs == (run(2),)


# ---- removed pages ---------------------------------------------------------------------------------


def test_removed_pages_are_never_fetched() -> None:
    engine = engine_of((8 * PAGE, PAGE))
    engine.removed(run(0, 7))
    engine.hint(run(0, 7))
    fetch = engine.next_background(0.0)
    assert fetch is not None
    assert fetch.runs == (run(7),)
    answer(engine, fetch)
    assert engine.finished


def test_a_fault_on_a_removed_page_gets_zeros() -> None:
    engine = engine_of()
    engine.removed(run(5))
    reply = engine.fault("a", [PageIndex(4), PageIndex(5)], VCPU, 0.0)
    assert (reply.ready, reply.zero_pages) == (False, (5,))
    assert engine.installed(run(5), zero=True) == []
    assert answer(engine, demand(engine)) == ["a"]


def test_a_removal_under_a_waiting_thread_gives_it_zeros() -> None:
    engine = engine_of()
    fault(engine, "a", 5)
    fetch = demand(engine)
    assert engine.removed(run(0, 10)) == [5]
    assert engine.arrived([Extent(run(5), DATA)], [fetch.request_id], 0.0) == []
    assert [waiter.key for waiter in engine.installed(run(5), zero=True)] == ["a"]


def test_a_page_that_failed_while_its_request_goes_on_is_fetched_once() -> None:
    """The rest of the first request comes to nothing; the second for the page is still on its way."""
    engine = engine_of((8 * PAGE, PAGE))
    fault(engine, "a", 1)
    first = demand(engine)
    (order,) = engine.arrived([Extent(run(1), DATA)], [], 0.0)
    engine.not_installed(order.run)
    second = demand(engine)
    assert engine.arrived([], [first.request_id], 0.0) == []
    assert engine.next_demand() is None
    answer(engine, second)
    assert engine.waiting == []
    assert engine.next_demand() is None


def test_what_was_removed_after_it_arrived_is_not_installed() -> None:
    engine = engine_of((8 * PAGE, PAGE))
    fetch = engine.next_background(0.0)
    assert fetch is not None
    (order,) = engine.arrived([Extent(run(0, 8), DATA)], [fetch.request_id], 0.0)
    engine.removed(run(2, 3))
    assert engine.to_install(order.run) == [run(0, 2), run(5, 3)]


# ---- the background ----------------------------------------------------------------------------------


def test_hints_come_first_and_in_their_order() -> None:
    engine = engine_of((64 * PAGE, PAGE), batch_bytes_max=8 * PAGE)
    engine.present(run(51))
    for hint in (run(40, 10), run(3), run(50, 3)):
        assert engine.hint(hint)
    fetches = [engine.next_background(0.0) for _ in range(3)]
    assert [fetch.runs for fetch in fetches if fetch] == [
        (run(40, 8),),
        (run(48, 2), run(3), run(50), run(52)),
        (run(0, 3), run(4, 5)),
    ]
    assert [fetch.priority for fetch in fetches if fetch] == [Priority.HINT] * 2 + [Priority.BACKGROUND]


def test_background_batches_are_small_and_do_not_cross_regions() -> None:
    engine = engine_of((200 * PAGE, PAGE), (2 * HUGE, HUGE), (2 * GIANT, GIANT), (10 * PAGE, PAGE))
    engine.window.ceiling_bytes = engine.window.size_bytes = 1 << 40
    sent = []
    while fetch := engine.next_background(0.0):
        (part,) = fetch.runs
        sent.append((part, fetch.size_bytes))
    assert sent == [
        (run(0, 128), 128 * PAGE),
        (run(128, 72), 72 * PAGE),
        (run(200), HUGE),
        (run(201), HUGE),
        (run(202), GIANT),
        (run(203), GIANT),
        (run(204, 10), 10 * PAGE),
    ]


def test_the_window_bounds_what_is_in_flight() -> None:
    engine = engine_of((4096 * PAGE, PAGE))
    while engine.next_background(0.0):
        pass
    window, batch = engine.window.size_bytes, engine.config.batch_bytes_max
    assert window <= engine.background_in_flight_bytes <= window + batch


def test_pages_that_came_by_demand_do_not_split_the_background_into_small_requests() -> None:
    engine = engine_of((256 * PAGE, PAGE), batch_bytes_max=64 * PAGE)
    for page in range(0, 128, 8):
        fault(engine, page, page)
    while fetch := engine.next_demand():
        answer(engine, fetch)
    sent = engine.next_background(0.0)
    assert sent is not None
    assert sent.size_bytes == 64 * PAGE
    assert [run.count for run in sent.runs] == [7] * 9 + [1]
    assert engine.background_in_flight_bytes == 64 * PAGE
    answer(engine, sent)
    assert engine.background_in_flight_bytes == 0
    assert engine.settled_pages == 16 + 64


def test_runs_of_one_background_request_are_bounded() -> None:
    engine = engine_of((4096 * PAGE, PAGE), batch_bytes_max=1024 * PAGE)
    for page in range(0, 1024, 2):
        fault(engine, page, page)
    while fetch := engine.next_demand():
        answer(engine, fetch)
    engine.window.batch_bytes = 1024 * PAGE
    sent = engine.next_background(0.0)
    assert sent is not None
    assert len(sent.runs) == RUNS_MAX


def test_a_lone_fault_is_a_fault_and_its_request_at_once() -> None:
    short, long = engine_of((64 * PAGE, PAGE)), engine_of((64 * PAGE, PAGE))
    fetch = short.lone_fault("a", PageIndex(5), Priority.VCPU, 1.0)
    assert fetch is not None
    assert not short.went("a", PageIndex(5), Priority.VCPU, 1.0)
    long.fault("a", [PageIndex(5)], Priority.VCPU, 1.0)
    assert fetch == long.next_demand()
    assert (short.waiting, short.stats) == (long.waiting, long.stats)
    assert short.awaits(fetch.request_id, PageIndex(5))
    woken = short.lone_installed(fetch.request_id, PageIndex(5))
    (order,) = long.arrived([Extent(fetch.runs[0], ExtentResult.DATA)], [fetch.request_id], 2.0)
    assert woken == long.installed(order.run)
    assert (short.stats, short.pages.counts()) == (long.stats, long.pages.counts())
    assert short.requests_in_flight == 0


def test_a_fault_that_is_not_lone_changes_nothing() -> None:
    engine = engine_of((64 * PAGE, PAGE), waiters_max=2)
    fault(engine, "a", 1)
    assert engine.lone_fault("b", PageIndex(2), Priority.VCPU, 0.0) is None, "another waits to be sent"
    demand(engine)
    assert engine.lone_fault("b", PageIndex(1), Priority.VCPU, 0.0) is None, "it is in flight"
    assert engine.lone_fault("a", PageIndex(2), Priority.VCPU, 0.0) is None, "the thread waits for another page"
    assert engine.lone_fault("b", PageIndex(2), Priority.VMM, 0.0) is not None
    assert engine.lone_fault("c", PageIndex(3), Priority.VMM, 0.0) is None, "no more threads may wait"
    assert engine.stats.demand_faults == 2
    assert engine.pages.total(PageState.IN_FLIGHT) == 2


def test_a_large_page_has_no_short_way() -> None:
    engine = engine_of((4 * HUGE, HUGE))
    assert engine.lone_fault("a", PageIndex(1), Priority.VCPU, 0.0) is None


def test_a_lone_page_that_was_removed_is_not_awaited() -> None:
    engine = engine_of((64 * PAGE, PAGE))
    fetch = engine.lone_fault("a", PageIndex(5), Priority.VCPU, 0.0)
    assert fetch is not None
    assert engine.removed(run(5)) == [5]
    assert not engine.awaits(fetch.request_id, PageIndex(5))
    engine.lost([fetch.request_id])
    assert not engine.awaits(fetch.request_id, PageIndex(5))


def test_the_background_goes_ahead_of_a_guest_that_goes_in_order() -> None:
    engine = engine_of(((1 << 16) * PAGE, PAGE))
    edge = 1000
    for _ in range(4096):
        if not engine.pages.is_present(PageIndex(edge)):
            fault(engine, "a", edge)
            while fetch := engine.next_demand() or engine.next_prefetch():
                answer(engine, fetch)
        edge += 1
    fetch = engine.next_background(0.0)
    assert fetch is not None
    assert 0 <= fetch.runs[0].first - edge <= DEPTH_MAX_PAGES


def test_faults_of_one_thread_are_one_way_whatever_their_keys() -> None:
    engine = engine_of((4096 * PAGE, PAGE))
    for page in range(100, 103):
        engine.fault(("page", page), [PageIndex(page)], Priority.VCPU, 0.0, who=7)
        answer(engine, demand(engine))
    assert engine.next_prefetch() is not None


def test_the_scan_wraps_round_to_what_was_lost() -> None:
    engine = engine_of((16 * PAGE, PAGE), batch_bytes_max=8 * PAGE)
    first = engine.next_background(0.0)
    second = engine.next_background(0.0)
    assert first is not None
    assert second is not None
    assert engine.next_background(0.0) is None
    engine.lost([first.request_id])
    answer(engine, second)
    again = engine.next_background(0.0)
    assert again is not None
    assert again.runs == first.runs


def test_the_cap_holds_back_the_background_and_never_demand() -> None:
    engine = engine_of((4096 * PAGE, PAGE), background_bytes_per_s=1_000_000)
    assert engine.next_background(1.0) is not None
    assert engine.next_background(1.0) is None
    for page in range(1000, 1100):
        fault(engine, page, page)
    assert demand(engine).size_bytes == 100 * PAGE


def test_present_pages_wake_their_threads() -> None:
    engine = engine_of()
    fault(engine, "a", 3)
    assert [waiter.key for waiter in engine.present(run(0, 10))] == ["a"]
    assert engine.next_demand() is None
    assert engine.settled_pages == 10


def test_installed_pages_are_counted_once() -> None:
    engine = engine_of()
    engine.installed(run(0, 4))
    engine.installed(run(0, 8))
    engine.installed(run(0, 8), existed=True)
    assert (engine.stats.installed_pages, engine.stats.existed_pages) == (8, 8)


def test_neighbours_are_asked_for_after_demand_and_within_a_batch() -> None:
    engine = engine_of((1024 * PAGE, PAGE), prefetch_bytes_max=4 * PAGE)
    for page in (10, 11, 12, 15, 20, 29):
        fault(engine, "a", page)
        answer(engine, demand(engine))
        while prefetch := engine.next_prefetch():
            assert prefetch.priority is Priority.NEIGHBOUR
            assert prefetch.size_bytes <= 4 * PAGE
            answer(engine, prefetch)
    assert engine.stats.prefetched_pages == 2 + 4 + 8 + 16
    assert engine.pages.is_present(29 + 16)


def test_pages_that_another_process_placed_wake_their_threads() -> None:
    engine = engine_of((16 * PAGE, PAGE))
    while engine.next_background(0.0):
        pass
    engine.fault("a", [PageIndex(3)], Priority.VCPU, 1.0)
    assert [waiter.key for waiter in engine.placed(run(0, 8))] == ["a"]
    assert engine.placed(run(8, 8), existed=True) == []
    assert engine.finished
    assert (engine.stats.installed_pages, engine.stats.existed_pages) == (8, 8)


def test_placed_pages_that_were_removed_since_stay_removed() -> None:
    engine = engine_of((16 * PAGE, PAGE))
    while engine.next_background(0.0):
        pass
    engine.removed(run(2, 3))
    assert engine.placed(run(0, 16)) == []
    assert [engine.pages.state(page) is PageState.REMOVED for page in (1, 2, 4, 5)] == [False, True, True, False]
    assert engine.stats.installed_pages == 13
