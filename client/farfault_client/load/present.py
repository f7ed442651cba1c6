"""Which pages a virtual guest holds already: as in a real guest, they do not fault again."""

from __future__ import annotations


class PresentPages:
    """One byte a page; scans run at the speed of C."""

    def __init__(self, page_count: int) -> None:
        self._pages = bytearray(page_count)
        self._absent = page_count

    def __contains__(self, page: int) -> bool:
        return self._pages[page] != 0

    @property
    def is_complete(self) -> bool:
        """Every page is present."""
        return self._absent == 0

    def add(self, page: int) -> None:
        """A page has come. Idempotent."""
        if not self._pages[page]:
            self._pages[page] = 1
            self._absent -= 1

    def next_absent(self, page: int) -> int | None:
        """The first absent page from `page` on, round the end; None where all are present."""
        found = self._pages.find(0, page)
        if found < 0:
            found = self._pages.find(0)
        return None if found < 0 else found

    def clear(self) -> None:
        """A fresh guest: nothing is present."""
        self._pages = bytearray(len(self._pages))
        self._absent = len(self._pages)
