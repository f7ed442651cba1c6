"""The transition table, pair by pair, and the map that applies it by runs."""

from __future__ import annotations

import itertools
import random
import tracemalloc

import pytest
from farfault_client.engine import page_map as module
from farfault_client.engine.page_map import PageMap
from farfault_client.engine.states import (
    CARRY_PRIORITY,
    PRIORITY_MASK,
    STATE_OF_BYTE,
    TRANSITIONS,
    PageInput,
    PageState,
    Priority,
    UndefinedTransitionError,
    encode,
    next_byte,
)
from farfault_shim.layout import PageIndex, PageRun
from hypothesis import given
from hypothesis import strategies as st

S, I = PageState, PageInput  # noqa: E741 - as the table is read
PAIRS = [(state, page_input) for state in PageState for page_input in PageInput]

EXPECTED = {
    #              WANT         SEND         ARRIVE     INSTALL      ZERO       LOSE      LOSE_IDLE  PLACE      REMOVE
    S.ABSENT: (S.WANTED, S.IN_FLIGHT, None, S.INSTALLED, None, None, None, S.INSTALLED, S.REMOVED),
    S.WANTED: (S.WANTED, S.IN_FLIGHT, None, S.INSTALLED, None, None, None, S.INSTALLED, S.REMOVED),
    S.IN_FLIGHT: (S.IN_FLIGHT, None, S.ARRIVED, S.INSTALLED, S.REMOVED, S.WANTED, S.ABSENT, S.INSTALLED, S.REMOVED),
    S.ARRIVED: (S.ARRIVED, None, None, S.INSTALLED, None, S.WANTED, S.ABSENT, S.INSTALLED, S.REMOVED),
    S.INSTALLED: (S.INSTALLED, None, None, S.INSTALLED, None, None, None, S.INSTALLED, S.REMOVED),
    S.REMOVED: (S.REMOVED, None, None, S.INSTALLED, None, None, None, S.REMOVED, S.REMOVED),
}


def _bytes_of(state: PageState) -> list[int]:
    return [byte for byte, found in STATE_OF_BYTE.items() if found is state]


@pytest.mark.parametrize(("state", "page_input"), PAIRS)
def test_every_pair(state: PageState, page_input: PageInput) -> None:
    expected = EXPECTED[state][page_input]
    assert TRANSITIONS.get((state, page_input)) is expected
    for byte in _bytes_of(state):
        for count in (1, 3):
            pages = PageMap(5)
            pages._bytes[1 : 1 + count] = bytes([byte]) * count
            pages._totals = [sum(STATE_OF_BYTE[b] is s for b in pages._bytes) for s in PageState]
            if expected is None:
                before = bytes(pages._bytes)
                with pytest.raises(UndefinedTransitionError) as caught:
                    pages.apply(1, count, page_input, Priority.VMM)
                assert (caught.value.state, caught.value.page_input, caught.value.page) == (state, page_input, 1)
                assert bytes(pages._bytes) == before
            else:
                settled = pages.apply(1, count, page_input, Priority.VMM)
                assert pages.state(1) is pages.state(count) is expected
                assert pages.state(0) is pages.state(4) is S.ABSENT
                was_settled = state in (S.INSTALLED, S.REMOVED)
                assert settled == count * ((expected in (S.INSTALLED, S.REMOVED)) - was_settled)


@pytest.mark.parametrize("own", Priority)
@pytest.mark.parametrize("given_priority", Priority)
def test_a_page_keeps_the_more_urgent_priority(own: Priority, given_priority: Priority) -> None:
    byte = next_byte(encode(S.ABSENT), I.WANT, own)
    assert next_byte(byte, I.WANT, given_priority) & PRIORITY_MASK == min(own, given_priority)
    assert next_byte(byte, I.SEND, given_priority) & PRIORITY_MASK == min(own, given_priority)


def test_a_raise_in_flight_survives_the_loss() -> None:
    pages = PageMap(1)
    pages.apply(0, 1, I.SEND, Priority.BACKGROUND)
    pages.apply(0, 1, I.WANT, Priority.VCPU)
    pages.apply(0, 1, I.LOSE)
    assert (pages.state(0), pages.priority(0)) == (S.WANTED, Priority.VCPU)


def test_every_state_has_bytes_of_its_own() -> None:
    assert len(STATE_OF_BYTE) == sum(5 if state in CARRY_PRIORITY else 1 for state in PageState)
    assert all(STATE_OF_BYTE[encode(state, 3)] is state for state in PageState)


def test_an_undefined_page_in_a_run_changes_nothing() -> None:
    pages = PageMap(8)
    pages.apply(0, 8, I.SEND, Priority.BACKGROUND)
    pages.apply(5, 1, I.INSTALL)
    with pytest.raises(UndefinedTransitionError, match="page 5: ARRIVE while INSTALLED"):
        pages.apply(0, 8, I.ARRIVE)
    assert pages.counts() == {s: {S.IN_FLIGHT: 7, S.INSTALLED: 1}.get(s, 0) for s in PageState}


def test_an_undefined_page_in_a_later_slice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_PAGES", 4)
    pages = PageMap(10)
    pages.apply(0, 10, I.SEND, Priority.BACKGROUND)
    pages.apply(9, 1, I.INSTALL)
    with pytest.raises(UndefinedTransitionError, match="page 9"):
        pages.apply(0, 10, I.ARRIVE)
    assert pages.total(S.IN_FLIGHT) == 9
    assert pages.apply(0, 10, I.REMOVE) == 9
    assert pages.total(S.REMOVED) == 10


@given(st.lists(st.sampled_from(list(STATE_OF_BYTE)), min_size=1, max_size=40), st.data())
def test_searches_and_counts_agree_with_a_list(content: list[int], data: st.DataObject) -> None:
    pages = PageMap(len(content))
    pages._bytes[:] = bytes(content)
    states = [STATE_OF_BYTE[byte] for byte in content]
    pages._totals = [states.count(state) for state in PageState]
    first = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(first + 1, len(content)))
    wanted = data.draw(st.lists(st.sampled_from(PageState), min_size=1, unique=True))
    found = [page for run in pages.runs(first, end - first, *wanted) for page in range(run.first, run.end)]
    assert found == [page for page in range(first, end) if states[page] in wanted]
    runs = pages.runs(first, end - first, *wanted)
    assert all(before.end < after.first for before, after in itertools.pairwise(runs)), "runs are longest"
    assert pages.counts(first, end) == {state: states[first:end].count(state) for state in PageState}
    assert pages.counts() == {state: states.count(state) for state in PageState}
    assert pages.settled_pages == sum(pages.is_settled(page) for page in range(len(content)))
    absent = pages.next_absent(first, end, 3)
    expected = next((page for page in range(first, end) if states[page] is S.ABSENT), None)
    if expected is None:
        assert absent is None
    else:
        count = next((n for n in range(1, 4) if expected + n >= end or states[expected + n] is not S.ABSENT), 3)
        assert absent == PageRun(PageIndex(expected), count)


def test_totals_follow_any_history() -> None:
    rng = random.Random(7)
    pages = PageMap(50)
    for _ in range(3000):
        first = rng.randrange(50)
        count = rng.randint(1, 50 - first)
        page_input = rng.choice(list(PageInput))
        try:
            pages.apply(first, count, page_input, rng.choice(list(Priority)))
        except UndefinedTransitionError:
            continue
        assert pages.counts() == {state: pages.counts(0, 50)[state] for state in PageState}
        assert [pages.state(page) for page in range(50)].count(S.ABSENT) == pages.total(S.ABSENT)


def test_one_byte_a_page_for_a_guest_of_1_tib() -> None:
    """256 Mi pages; the largest changes of a run stay within two bytes a page as well."""
    count = (1 << 40) // 4096
    tracemalloc.start()
    try:
        pages = PageMap(count)
        pages.apply(0, count, I.SEND, Priority.BACKGROUND)
        pages.apply(0, count, I.INSTALL)
        pages.apply(1 << 20, count - (1 << 21), I.REMOVE)
        assert pages.settled_pages == count
        assert pages.next_absent(0, count, 64) is None
        assert len(pages.runs(0, count, S.INSTALLED)) == 2
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1.1 * count
