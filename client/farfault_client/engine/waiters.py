"""Which threads wait for which pages."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from farfault_shim.layout import PageIndex, PageRun

from farfault_client.engine.states import Priority


class Waiter(NamedTuple):
    """A thread that waits for pages.

    Attributes:
        key: names it for the driver; a second fault of the same key replaces the first.
        priority: VCPU or VMM.
        since: when it began to wait, in seconds.
        pages: what it waits for; all of them must be present.
    """

    key: Hashable
    priority: Priority
    since: float
    pages: tuple[PageIndex, ...]


class Waiters:
    """Threads and pages, found either way."""

    def __init__(self) -> None:
        self._waiters: dict[object, tuple[Waiter, set[PageIndex]]] = {}
        self._keys_of_page: dict[int, list[object]] = {}

    def __len__(self) -> int:
        """Threads that wait."""
        return len(self._waiters)

    def __contains__(self, key: object) -> bool:
        return key in self._waiters

    def all(self) -> list[Waiter]:
        """The threads that wait, in the order in which they began."""
        return [waiter for waiter, _ in self._waiters.values()]

    def add(self, waiter: Waiter, missing: set[PageIndex]) -> None:
        """A thread waits until every page of `missing` is present."""
        self._waiters[waiter.key] = (waiter, missing)
        for page in missing:
            keys = self._keys_of_page.get(page)
            if keys is None:
                self._keys_of_page[page] = [waiter.key]
            else:
                keys.append(waiter.key)

    def forget(self, key: object) -> Waiter | None:
        """A thread no longer waits; None: it did not."""
        entry = self._waiters.pop(key, None)
        if entry is None:
            return None
        waiter, missing = entry
        for page in missing:
            keys = self._keys_of_page[page]
            keys.remove(key)
            if not keys:
                del self._keys_of_page[page]
        return waiter

    def of_page(self, page: int) -> Waiter | None:
        """One of the threads that wait for a page, the most urgent; None: nobody does."""
        keys = self._keys_of_page.get(page)
        if keys is None:
            return None
        return min((self._waiters[key][0] for key in keys), key=lambda waiter: waiter.priority)

    def is_awaited(self, page: int) -> bool:
        """Somebody waits for a page."""
        return page in self._keys_of_page

    def awaited(self, run: PageRun) -> list[int]:
        """The pages of a run that somebody waits for, in order. Looks at the run or at the waiters, the fewer."""
        pages = self._keys_of_page
        if not pages:
            return []
        if run.count == 1:
            return [run.first] if run.first in pages else []
        if run.count > len(pages):
            return sorted(page for page in pages if run.first <= page < run.end)
        return [page for page in range(run.first, run.end) if page in pages]

    def wake(self, pages: Iterable[int]) -> list[Waiter]:
        """Awaited pages are present: the threads that wait for nothing any more, which are forgotten."""
        woken: list[Waiter] = []
        for page in pages:
            for key in self._keys_of_page.pop(page):
                waiter, missing = self._waiters[key]
                missing.discard(PageIndex(page))
                if not missing:
                    del self._waiters[key]
                    woken.append(waiter)
        return woken
