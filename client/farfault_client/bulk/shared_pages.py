"""The state of every page where the receiver and its bulk process both see it, and the lock between them.

The receiver writes the states, the bulk process reads them: it installs pages that are in flight, and leaves those
alone that the guest has given back. Both hold the lock while they do what must not come in between the other's two
steps: the bulk process from looking at the states until the pages are in memory, the receiver from reading a removal
off the userfaultfd (from then on the kernel lets the guest go on, and pages be installed there) until the states say
so. The lock is a POSIX record lock, so it ends with the process that holds it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

YIELD_S: Final = 20e-6
"""The bulk process looks again after this long whether the receiver still wants the lock."""
YIELDS_MAX: Final = 250
"""Then it goes on: a receiver that was stopped in between must not hold the background up for ever."""


class SharedPages:
    """A memfd with a byte a page, mapped here; all zero at first.

    Args:
        page_count: pages of the guest.
        descriptor: of the memfd that the other process has made; None: make one. It is ours from now on.
    """

    def __init__(self, page_count: int, descriptor: int | None = None) -> None:
        self._wanted_at = page_count
        if descriptor is None:
            descriptor = os.memfd_create("farfault-pages", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, page_count + 1)
        self._descriptor = descriptor
        self.states = mmap.mmap(descriptor, page_count + 1)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        """Gives the descriptor back; the states stay mapped while somebody uses them."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @contextmanager
    def first(self) -> Iterator[None]:
        """Holds the lock for the receiver, which does not stand in line: the bulk process makes way."""
        self.states[self._wanted_at] = 1
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            self.states[self._wanted_at] = 0
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)

    @contextmanager
    def second(self) -> Iterator[None]:
        """Holds the lock for the bulk process."""
        for _ in range(YIELDS_MAX):
            if not self.states[self._wanted_at]:
                break
            time.sleep(YIELD_S)
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
