"""In which order the background fetches what nobody waits for: hinted pages, then on from where the guest goes.

All of memory has to come, so any order is right; the best one is ahead of the guest. The background goes through
memory from a *cursor* upwards and round. A vCPU that goes through its memory in order gets a cursor at the edge of
what was prefetched for it, and from then on finds its next page under way. Several cursors take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine.page_map import PageMap
from farfault_client.engine.states import Priority

HINT_RUNS_MAX: Final = 1 << 16
"""Hinted runs that wait to be fetched."""
CURSORS_MAX: Final = 8
"""Places that take turns; the last in line is given up for another."""
RUNS_MAX: Final = 64
"""Runs in one batch."""


class BackgroundOrder:
    """Chooses the next absent pages.

    Args:
        layout: guest memory.
        pages: the state of every page; looked at, never changed.
    """

    def __init__(self, layout: Layout, pages: PageMap) -> None:
        self._layout = layout
        self._pages = pages
        self._hints: deque[PageRun] = deque()
        self._cursors: deque[int] = deque([0])
        self._follows = False

    def hint(self, run: PageRun) -> bool:
        """These pages come first, after earlier hints.

        Returns:
            False if `HINT_RUNS_MAX` hints wait already.
        """
        if len(self._hints) >= HINT_RUNS_MAX:
            return False
        for _, part in self._layout.split(*run):
            self._hints.append(part)
        return True

    def follow(self, page: int, reach_pages: int) -> None:
        """A guest goes through its memory upwards and will need `page` soon.

        Args:
            page: where it will be.
            reach_pages: a cursor that is at most so far ahead is there already; one that is so far behind catches up.
        """
        if not self._follows:  # the first guest takes the background along from where it was
            self._follows = True
            self._cursors.clear()
        for index, cursor in enumerate(self._cursors):
            if abs(cursor - page) <= reach_pages:
                self._cursors[index] = max(cursor, page)
                return
        if len(self._cursors) >= CURSORS_MAX:
            self._cursors.pop()
        self._cursors.appendleft(page)

    def next_runs(self, batch_bytes: int) -> Iterator[tuple[PageRun, Priority]]:
        """The next absent pages, of one region and at most a batch, and HINT or BACKGROUND; none where none are left.

        Where pages came by demand, those that are absent lie in short runs, and a request for each of them would cost
        more than its pages do: a batch has up to `RUNS_MAX`. The caller gives every run its state before the next.
        """
        has_hint = False
        for run in self._hinted(batch_bytes):
            has_hint = True
            yield run, Priority.HINT
        if not has_hint:
            for run in self._scanned(batch_bytes):
                yield run, Priority.BACKGROUND

    def _hinted(self, batch_bytes: int) -> Iterator[PageRun]:
        """The first absent pages of the hints."""
        region, pages_left, runs = None, 0, 0
        while self._hints and runs < RUNS_MAX:
            hint = self._hints[0]
            its_region = self._layout.region_of_page(hint.first)
            if not runs:
                region, pages_left = its_region, self._batch_pages(batch_bytes, hint.first)
            elif its_region is not region or not pages_left:
                return
            self._hints.popleft()
            absent = self._pages.next_absent(hint.first, hint.end, pages_left)
            if absent is None:
                continue
            if absent.end < hint.end:
                self._hints.appendleft(PageRun(PageIndex(absent.end), hint.end - absent.end))
            runs += 1
            pages_left -= absent.count
            yield absent

    def _scanned(self, batch_bytes: int) -> Iterator[PageRun]:
        """The next absent runs from the cursor on whose turn it is; it wraps round before the first."""
        cursor = self._cursors.popleft()
        found = self._pages.next_absent(cursor, self._layout.page_count, 1) or self._pages.next_absent(0, cursor, 1)
        if found is None:
            self._cursors.append(cursor)
            return
        end = self._layout.region_of_page(found.first).end_page
        cursor, pages_left = int(found.first), self._batch_pages(batch_bytes, found.first)
        for _ in range(RUNS_MAX):
            run = self._pages.next_absent(cursor, end, pages_left)
            if run is None:
                cursor = end
                break
            cursor, pages_left = run.end, pages_left - run.count
            yield run
            if not pages_left:
                break
        self._cursors.append(cursor % self._layout.page_count)

    def _batch_pages(self, batch_bytes: int, page: int) -> int:
        return max(1, batch_bytes // self._layout.region_of_page(page).page_size_bytes)
