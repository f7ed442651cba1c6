"""Neighbour prefetch: what each kind of guest gains and pays."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from farfault_client.engine import EngineConfig, Extent, ExtentResult, FaultEngine, Priority
from farfault_client.engine import neighbours as module
from farfault_client.engine.neighbours import (
    DEPTH_MAX_PAGES,
    STREAM_AGE_FAULTS,
    STREAMS_MAX,
    NeighbourPrefetch,
)
from farfault_shim.layout import Layout, PageIndex
from hypothesis import given
from hypothesis import strategies as st

PAGE = 4096
PAGES = 16384


class Cost:
    """What a guest's touches cost, with the engine in between and every fetch answered at once."""

    def __init__(self, touches: Iterable[tuple[int, int]], pages: int = PAGES) -> None:
        engine = FaultEngine(Layout([(pages * PAGE, PAGE)]))
        touched: set[int] = set()
        self.faults = 0
        for vcpu, page in touches:
            touched.add(page)
            if engine.pages.is_present(page):
                continue
            self.faults += 1
            engine.fault(vcpu, [PageIndex(page)], Priority.VCPU, 0.0)
            while fetch := engine.next_demand() or engine.next_prefetch():
                extents = [Extent(run, ExtentResult.DATA) for run in fetch.runs]
                for order in engine.arrived(extents, [fetch.request_id], 0.0):
                    engine.installed(order.run)
        self.touched = len(touched)
        self.fetched = engine.settled_pages
        self.extra_share = (self.fetched - self.touched) / self.touched


def test_a_sequential_guest_faults_rarely() -> None:
    cost = Cost((0, page) for page in range(4096))
    assert cost.faults < 4096 / 40
    assert cost.extra_share < 0.02


def test_a_guest_that_runs_backwards_does_too() -> None:
    cost = Cost((0, page) for page in range(4095, -1, -1))
    assert cost.faults < 4096 / 40
    assert cost.extra_share < 0.02


@pytest.mark.parametrize("stride", [2, 3, 8, -5, 64])
def test_a_strided_guest_does_too(stride: int) -> None:
    pages = range(0, PAGES, stride) if stride > 0 else range(PAGES - 1, -1, stride)
    cost = Cost((0, page) for page in pages)
    assert cost.faults < len(pages) / 10
    assert cost.extra_share < 0.02


@pytest.mark.parametrize("pages", [512, 4096, PAGES])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("vcpus", [1, 8])
def test_a_random_guest_pays_at_most_five_per_cent(pages: int, share: float, vcpus: int) -> None:
    rng = random.Random(pages + vcpus)
    touches = [(rng.randrange(vcpus), page) for page in rng.sample(range(pages), int(pages * share))]
    cost = Cost(touches, pages)
    assert cost.fetched - cost.touched <= max(module.BUDGET_FREE_PAGES, 0.05 * cost.touched), cost.extra_share


def test_sequential_vcpus_side_by_side() -> None:
    touches = [(vcpu, vcpu * 1024 + step) for step in range(1000) for vcpu in range(16)]
    cost = Cost(touches)
    assert cost.faults < len(touches) / 20
    assert cost.extra_share < 0.06


def test_a_copy_is_two_streams_of_one_vcpu() -> None:
    touches = [(0, base + step) for step in range(1000) for base in (0, 8192)]
    cost = Cost(touches)
    assert cost.faults < len(touches) / 20


def test_a_guest_that_changes_its_ways_is_followed() -> None:
    rng = random.Random(1)
    touches = [(0, page) for page in rng.sample(range(8192), 4000)] + [(0, page) for page in range(8192, 12288)]
    before = Cost(touches[:4000])
    cost = Cost(touches)
    assert cost.faults - before.faults < 4096 / 20


def test_depth_grows_with_each_proof() -> None:
    prefetch = NeighbourPrefetch()
    assert prefetch.fault(0, 10, 1000) == []
    assert prefetch.fault(0, 11, 1000) == []
    edge, counts = 12, []
    for _ in range(8):
        (run,) = prefetch.fault(0, edge, 1000)
        assert run.first == edge + 1
        counts.append(run.count)
        edge = run.end
    assert counts == [2, 4, 8, 16, 32, 64, 64, 64]
    assert prefetch.hits == 7
    assert prefetch.hit_rate == 1.0


def test_a_guest_ahead_of_its_stream_is_followed() -> None:
    prefetch = NeighbourPrefetch()
    for page in (0, 1, 2):
        (*_, last) = [None, *prefetch.fault(0, page, 1000)]
    assert last == (3, 2)
    assert prefetch.fault(0, 5, 1000) == [(6, 4)], "the edge"
    assert prefetch.fault(0, 8, 1000) == [(10, 8)], "inside of what was asked for"
    assert prefetch.fault(0, 20, 1000) == [(21, 16)], "behind pages that the background had brought"


def test_streams_of_different_vcpus_do_not_mix() -> None:
    prefetch = NeighbourPrefetch()
    assert [prefetch.fault(vcpu, vcpu, 1000) for vcpu in range(10)] == [[]] * 10


@pytest.mark.parametrize("depth", [0, 1])
def test_depth_is_bounded(depth: int) -> None:
    prefetch = NeighbourPrefetch(depth)
    asked = [run.count for page in range(100) for run in prefetch.fault(0, page, 1000)]
    assert sum(asked) == 0 if depth == 0 else max(asked) == 1


def test_a_stream_that_ends_is_a_miss() -> None:
    prefetch = NeighbourPrefetch()
    for page in (0, 1, 2):
        prefetch.fault(0, page, 100_000)
    for step in range(STREAM_AGE_FAULTS + 1):
        prefetch.fault(0, 1000 + step * 100, 100_000)
    assert (prefetch.hits, prefetch.misses, prefetch.wasted_pages) == (0, 1, 2)
    assert prefetch.hit_rate == 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 63)), max_size=300), st.integers(1, 64))
def test_neighbours_lie_in_the_region_and_memory_is_bounded(faults: list[tuple[int, int]], page_count: int) -> None:
    prefetch = NeighbourPrefetch()
    for vcpu, page in faults:
        for run in prefetch.fault(vcpu, page % page_count, page_count):
            assert 0 <= run.first < run.end <= page_count
            assert run.count <= DEPTH_MAX_PAGES
    assert len(prefetch._streams) <= STREAMS_MAX
    assert len(prefetch._histories) <= 4
    assert prefetch._unproven_pages == sum(s.depth for s in prefetch._streams.values() if not s.proven)


def test_vcpus_that_come_and_go_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HISTORIES_MAX", 4)
    prefetch = NeighbourPrefetch()
    for vcpu in range(100):
        prefetch.fault(vcpu, 5, 10)
    assert len(prefetch._histories) == 4


def test_huge_pages_have_no_neighbours() -> None:
    engine = FaultEngine(Layout([(64 << 21, 2 << 20)]), EngineConfig())
    for page in range(10):
        engine.fault(0, [PageIndex(page)], Priority.VCPU, 0.0)
        engine.next_demand()
    assert engine.next_prefetch() is None
