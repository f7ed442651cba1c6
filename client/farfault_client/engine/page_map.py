"""One byte a page for all of guest memory: the states of `states`, searched and changed by runs.

No Python code runs per page: searches are byte searches, changes of a run use a translation table that
is made from the transition table. A 1 TiB guest of 4 KiB pages costs 256 MiB.
"""

from __future__ import annotations

import mmap
import re
from functools import cache
from typing import Final, TypeAlias

from farfault_shim.layout import PageIndex, PageRun

from farfault_client.engine.states import (
    ABSENT_BYTE,
    CARRY_PRIORITY,
    INSTALLED_BYTE,
    PRIORITY_MASK,
    REMOVED_BYTE,
    STATE_OF_BYTE,
    STATE_SHIFT,
    TRANSITIONS,
    PageInput,
    PageState,
    Priority,
    UndefinedTransitionError,
    next_byte,
)

StateBytes: TypeAlias = bytearray | mmap.mmap
"""A byte a page, as `states.encode` makes them."""
SLICE_PAGES: Final = 1 << 20
"""A longer run is changed in slices of this many pages, so that a change needs little memory."""
_UNDEFINED: Final = 0xFF
_ABSENT: Final = bytes([ABSENT_BYTE])
_INSTALLED, _REMOVED = int(PageState.INSTALLED), int(PageState.REMOVED)


def _translation(page_input: PageInput, priority: int) -> bytes:
    table = bytearray([_UNDEFINED]) * 256
    for byte, state in STATE_OF_BYTE.items():
        if (state, page_input) in TRANSITIONS:
            table[byte] = next_byte(byte, page_input, priority)
    return bytes(table)


_TRANSLATIONS: Final = tuple(
    tuple(_translation(page_input, priority) for priority in (0, *Priority)) for page_input in PageInput
)
"""By input, then by priority."""


@cache
def _run_pattern(states: tuple[PageState, ...]) -> re.Pattern[bytes]:
    members = bytes(byte for byte, state in STATE_OF_BYTE.items() if state in states)
    return re.compile(b"[" + re.escape(members) + b"]+")


def runs_in(states_of: StateBytes, first: int, count: int, *states: PageState) -> list[PageRun]:
    """The runs of pages within ``[first, first + count)`` that are in one of the states, in order."""
    search, found = _run_pattern(states).search, []
    position, end = first, first + count
    while match := search(states_of, position, end):
        start, position = match.span()
        found.append(PageRun(PageIndex(start), position - start))
    return found


class PageMap:
    """The state of every page.

    Args:
        page_count: pages of the guest, of whatever size; all start ABSENT.
        memory: at least as many zero bytes that hold the states, for others to read; None: memory of its own.
    """

    def __init__(self, page_count: int, memory: StateBytes | None = None) -> None:
        self._bytes: StateBytes = bytearray(page_count) if memory is None else memory
        self._totals = [0] * len(PageState)
        self._totals[PageState.ABSENT] = page_count
        self.page_count = page_count

    def state(self, page: int) -> PageState:
        return STATE_OF_BYTE[self._bytes[page]]

    def priority(self, page: int) -> int:
        """Priority of a wanted, in-flight or arrived page; 0 for others."""
        return self._bytes[page] & PRIORITY_MASK

    def is_absent(self, page: int) -> bool:
        """Nobody has wanted it or asked for it."""
        return self._bytes[page] == ABSENT_BYTE

    def is_present(self, page: int) -> bool:
        """Installed in guest memory."""
        return self._bytes[page] == INSTALLED_BYTE

    def is_settled(self, page: int) -> bool:
        """Installed or removed: never fetched again."""
        return self._bytes[page] >= INSTALLED_BYTE

    def total(self, state: PageState) -> int:
        """Pages in a state now; kept, not counted."""
        return self._totals[state]

    @property
    def settled_pages(self) -> int:
        """Pages that are installed or removed."""
        return self._totals[_INSTALLED] + self._totals[_REMOVED]

    def apply(self, first: int, count: int, page_input: PageInput, priority: int = 0) -> int:
        """Gives every page of a run the same input.

        Returns:
            How many more pages are settled now.

        Raises:
            UndefinedTransitionError: for the first page whose state the table does not name; no page has changed.
        """
        table = _TRANSLATIONS[page_input][priority]
        if count == 1:
            before = self._bytes[first]
            after = table[before]
            if after == _UNDEFINED:
                raise UndefinedTransitionError(STATE_OF_BYTE[before], page_input, first)
            self._bytes[first] = after
            self._totals[before >> STATE_SHIFT] -= 1
            self._totals[after >> STATE_SHIFT] += 1
            return (after >= INSTALLED_BYTE) - (before >= INSTALLED_BYTE)
        settled_before = self.settled_pages
        if count <= SLICE_PAGES:
            self._apply_slice(first, count, page_input, table)
            return self.settled_pages - settled_before
        slices = [
            (start, min(SLICE_PAGES, first + count - start)) for start in range(first, first + count, SLICE_PAGES)
        ]
        for start, length in slices:
            _check_defined(self._bytes[start : start + length], start, page_input, table)
        for start, length in slices:
            self._apply_slice(start, length, page_input, table)
        return self.settled_pages - settled_before

    def _apply_slice(self, first: int, count: int, page_input: PageInput, table: bytes) -> None:
        before = self._bytes[first : first + count]
        after = _check_defined(before, first, page_input, table)
        self._bytes[first : first + count] = after
        totals = self._totals
        if before.count(before[0]) == count:
            totals[before[0] >> STATE_SHIFT] -= count
            totals[after[0] >> STATE_SHIFT] += count
            return
        for byte in STATE_OF_BYTE:
            if found := before.count(byte):
                totals[byte >> STATE_SHIFT] -= found
                totals[table[byte] >> STATE_SHIFT] += found

    def runs(self, first: PageIndex, count: int, *states: PageState) -> list[PageRun]:
        """The runs of pages within ``[first, first + count)`` that are in one of the states, in order."""
        if count == 1:
            return [PageRun(first, 1)] if self._bytes[first] >> STATE_SHIFT in states else []
        return runs_in(self._bytes, first, count, *states)

    def next_absent(self, start: int, limit: int, count_max: int) -> PageRun | None:
        """The first run of ABSENT pages in ``[start, limit)``, at most `count_max` long; None: there is none."""
        first = self._bytes.find(_ABSENT, start, limit)
        if first < 0:
            return None
        match = _ABSENT_RUN.match(self._bytes, first, min(first + count_max, limit))
        assert match is not None
        return PageRun(PageIndex(first), match.end() - first)

    def settled_within(self, first: int, end: int) -> int:
        """Pages of ``[first, end)`` that are installed or removed, by a scan in C."""
        part = self._bytes[first:end]
        return part.count(INSTALLED_BYTE) + part.count(REMOVED_BYTE)

    def counts(self, first: int = 0, end: int | None = None) -> dict[PageState, int]:
        """Pages by state: of all memory at once, of ``[first, end)`` by a scan in C."""
        end = self.page_count if end is None else end
        if (first, end) == (0, self.page_count):
            return {state: self._totals[state] for state in PageState}
        counts = dict.fromkeys(PageState, 0)
        for start in range(first, end, SLICE_PAGES):
            part = self._bytes[start : min(start + SLICE_PAGES, end)]
            missing = len(part)
            for state in (PageState.ABSENT, PageState.INSTALLED, PageState.REMOVED):
                found = part.count(state << STATE_SHIFT)
                counts[state] += found
                missing -= found
            if missing:
                for byte, state in STATE_OF_BYTE.items():
                    if state in CARRY_PRIORITY:
                        counts[state] += part.count(byte)
        return counts


_ABSENT_RUN: Final = _run_pattern((PageState.ABSENT,))


def _check_defined(before: bytearray | bytes, first: int, page_input: PageInput, table: bytes) -> bytearray | bytes:
    """The run after the input."""
    after = before.translate(table)
    bad = after.find(_UNDEFINED)
    if bad >= 0:
        raise UndefinedTransitionError(STATE_OF_BYTE[before[bad]], page_input, first + bad)
    return after
