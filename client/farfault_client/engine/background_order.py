"""In which order the background fetches what nobody waits for: hinted pages, then on from where the guest goes.

All of memory has to come, so any order is right; the best one is ahead of the guest. The background goes through
memory from a *cursor* upwards and round. A vCPU that goes through its memory in order gets a cursor at the edge of
what was prefetched for it, and from then on finds its next page under way. Several cursors take turns.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from farfault_shim.layout import PAGE_SIZES_BYTES, Layout, PageIndex, PageRun

from farfault_client.engine.page_map import PageMap
from farfault_client.engine.states import Priority

HINT_RUNS_MAX: Final = 1 << 16
"""Hinted runs that wait to be fetched."""
CURSORS_MAX: Final = 8
"""Places that take turns; the last in line is given up for another."""
SMALLEST_PAGE_BYTES: Final = min(PAGE_SIZES_BYTES)


class BackgroundOrder:
    """Chooses the next run of absent pages.

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

    def next_run(self, batch_bytes: int) -> tuple[PageRun, Priority] | None:
        """The next absent pages, within one region and a batch, and HINT or BACKGROUND; None: there are none."""
        run = self._next_hint(batch_bytes)
        if run is not None:
            return run, Priority.HINT
        run = self._scan(batch_bytes)
        return None if run is None else (run, Priority.BACKGROUND)

    def _next_hint(self, batch_bytes: int) -> PageRun | None:
        """The first absent pages of the first hint that has any, at most a batch."""
        while self._hints:
            run = self._hints.popleft()
            absent = self._pages.next_absent(run.first, run.end, self._batch_pages(batch_bytes, run.first))
            if absent is None:
                continue
            if absent.end < run.end:
                self._hints.appendleft(PageRun(PageIndex(absent.end), run.end - absent.end))
            return absent
        return None

    def _scan(self, batch_bytes: int) -> PageRun | None:
        """The next absent run after the cursor whose turn it is, wrapping round; never across a region border."""
        cursor = self._cursors.popleft()
        pages_max = max(1, batch_bytes // SMALLEST_PAGE_BYTES)
        run = self._pages.next_absent(cursor, self._layout.page_count, pages_max)
        if run is None:
            run = self._pages.next_absent(0, cursor, pages_max)
        if run is None:
            self._cursors.append(cursor)
            return None
        region = self._layout.region_of_page(run.first)
        count = min(run.count, region.end_page - run.first, self._batch_pages(batch_bytes, run.first))
        self._cursors.append((run.first + count) % self._layout.page_count)
        return PageRun(run.first, count)

    def _batch_pages(self, batch_bytes: int, page: int) -> int:
        return max(1, batch_bytes // self._layout.region_of_page(page).page_size_bytes)
