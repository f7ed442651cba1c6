"""One byte a page for all of guest memory: the states of `states`, searched and changed by runs.

No Python code runs per page: searches are byte searches, changes of a run use a translation table that
is made from the transition table. A 1 TiB guest of 4 KiB pages costs 256 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from farfault_shim.layout import PageIndex, PageRun

from farfault_client.engine.states import (
    ABSENT_BYTE,
    IN_FLIGHT_BASE,
    INSTALLED_BYTE,
    REMOVED_BYTE,
    STATE_OF_BYTE,
    TRANSITIONS,
    PageInput,
    PageState,
    Priority,
    UndefinedTransitionError,
    next_byte,
)

_UNDEFINED = 0xFF
_SINGLE_PAGE = 1


@cache
def _translation(page_input: PageInput, priority: int) -> bytes:
    table = bytearray([_UNDEFINED]) * 256
    for byte, state in STATE_OF_BYTE.items():
        if (state, page_input) in TRANSITIONS:
            table[byte] = next_byte(byte, page_input, priority)
    return bytes(table)


@cache
def _run_pattern(states: frozenset[PageState]) -> re.Pattern[bytes]:
    members = bytes(byte for byte, state in STATE_OF_BYTE.items() if state in states)
    return re.compile(b"[" + re.escape(members) + b"]+")


class PageMap:
    """The state of every page.

    Args:
        page_count: pages of the guest, of whatever size; all start ABSENT.
    """

    def __init__(self, page_count: int) -> None:
        self._bytes = bytearray(page_count)
        self.page_count = page_count

    def state(self, page: int) -> PageState:
        return STATE_OF_BYTE[self._bytes[page]]

    def priority(self, page: int) -> int:
        """Priority of a wanted or in-flight page; 0 for others."""
        byte = self._bytes[page]
        return byte & 0x0F if byte < INSTALLED_BYTE else 0

    def is_present(self, page: int) -> bool:
        """Installed in guest memory."""
        return self._bytes[page] == INSTALLED_BYTE

    def is_settled(self, page: int) -> bool:
        """Installed or removed: never fetched again."""
        return self._bytes[page] >= INSTALLED_BYTE

    def apply(self, first: int, count: int, page_input: PageInput, priority: int = 0) -> None:
        """Gives every page of a run the same input.

        Raises:
            UndefinedTransitionError: for the first page whose state the table does not name; no page has changed.
        """
        if count == _SINGLE_PAGE:
            self._bytes[first] = next_byte(self._bytes[first], page_input, priority, page=first)
            return
        before = self._bytes[first : first + count]
        after = before.translate(_translation(page_input, priority))
        bad = after.find(_UNDEFINED)
        if bad >= 0:
            raise UndefinedTransitionError(STATE_OF_BYTE[before[bad]], page_input, first + bad)
        self._bytes[first : first + count] = after

    def runs(self, first: int, count: int, *states: PageState) -> Iterator[PageRun]:
        """The runs of pages within ``[first, first + count)`` that are in one of the states, in order."""
        pattern = _run_pattern(frozenset(states))
        position, end = first, first + count
        while match := pattern.search(self._bytes, position, end):
            yield PageRun(PageIndex(match.start()), match.end() - match.start())
            position = match.end()

    def next_absent(self, start: int, limit: int, count_max: int) -> PageRun | None:
        """The first run of ABSENT pages in ``[start, limit)``, at most `count_max` long; None: there is none."""
        first = self._bytes.find(ABSENT_BYTE, start, limit)
        if first < 0:
            return None
        match = _run_pattern(frozenset({PageState.ABSENT})).match(self._bytes, first, min(first + count_max, limit))
        assert match is not None
        return PageRun(PageIndex(first), match.end() - first)

    def counts(self, first: int = 0, end: int | None = None) -> dict[PageState, int]:
        """Pages by state within ``[first, end)``, by default all; a scan in C."""
        end = self.page_count if end is None else end
        counts = dict.fromkeys(PageState, 0)
        counts[PageState.ABSENT] = self._bytes.count(ABSENT_BYTE, first, end)
        counts[PageState.INSTALLED] = self._bytes.count(INSTALLED_BYTE, first, end)
        counts[PageState.REMOVED] = self._bytes.count(REMOVED_BYTE, first, end)
        moving = end - first - sum(counts.values())
        if moving:
            in_flight = sum(self._bytes.count(IN_FLIGHT_BASE | priority, first, end) for priority in Priority)
            counts[PageState.IN_FLIGHT], counts[PageState.WANTED] = in_flight, moving - in_flight
        return counts
