"""Pages that threads wait for and that no request names yet; the threads take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

ORPHANS: Final = object()
"""Stands for the threads that no longer wait; their pages are fetched all the same."""


class DemandQueue:
    """Takes one page from each thread in turn, so that a thread with many pages does not hold up the others.

    A thread needs all of its pages, so they come in any order, each once. The queue holds at most the pages that
    threads wait for, and those whose thread was forgotten.

    Attributes:
        waiting: what each thread needs, empty where nobody needs anything; not to be changed.
    """

    def __init__(self) -> None:
        # Ordered, because the first entry of a plain dict is found by looking at every gap before it.
        self.waiting: OrderedDict[object, dict[int, None]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def add(self, key: object, page: int) -> None:
        """A thread needs a page."""
        pages = self.waiting.get(key)
        if pages is None:
            self.waiting[key] = {page: None}
        else:
            pages[page] = None

    def forget(self, key: object) -> None:
        """A thread no longer waits; what it asked for stays in the queue."""
        pages = self.waiting.pop(key, None)
        if pages is not None:
            self.waiting.setdefault(ORPHANS, {}).update(pages)

    def take(self) -> Iterator[int]:
        """Takes pages off the queue, one from each thread in turn, until the caller stops or it is empty."""
        while self.waiting:
            key, pages = self.waiting.popitem(last=False)
            page, _ = pages.popitem()
            if pages:
                self.waiting[key] = pages  # behind the others
            yield page
