"""The state of every page where the receiver and its bulk process both see it, and the lock between them.

The receiver writes the states, the bulk process reads them: it installs pages that are in flight, and leaves those
alone that the guest has given back. Both hold the lock while they do what must not come in between the other's two
steps: the bulk process from looking at the states until the pages are in memory, the receiver from reading a removal
off the userfaultfd (from then on the kernel lets the guest go on, and pages be installed there) until the states say
so. The lock is a POSIX record lock, so it ends with the process that holds it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import time
from contextlib import AbstractContextManager
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

    Attributes:
        states: the bytes.
        first: ``with shared.first:`` holds the lock for the receiver, which does not stand in line: the bulk process
            makes way.
        second: holds it for the bulk process.
    """

    def __init__(self, page_count: int, descriptor: int | None = None) -> None:
        if descriptor is None:
            descriptor = os.memfd_create("farfault-pages", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, page_count + 1)
        self._descriptor = descriptor
        self.states = mmap.mmap(descriptor, page_count + 1)
        self.first: AbstractContextManager[None] = _First(descriptor, self.states, page_count)
        self.second: AbstractContextManager[None] = _Second(descriptor, self.states, page_count)

    def fileno(self) -> int:
        return self._descriptor

    @property
    def address(self) -> int:
        """Of the bytes, for C; behind them lies the one that says that the receiver wants the lock."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.states))

    def close(self) -> None:
        """Gives the descriptor back; the states stay mapped while somebody uses them."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Turn:
    """The lock, as one of the two holds it."""

    def __init__(self, descriptor: int, states: mmap.mmap, wanted_at: int) -> None:
        self._descriptor, self._states, self._wanted_at = descriptor, states, wanted_at

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


class _First(_Turn):
    """The receiver's turn."""

    def __enter__(self) -> None:
        self._states[self._wanted_at] = 1
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        self._states[self._wanted_at] = 0


class _Second(_Turn):
    """The bulk process's turn."""

    def __enter__(self) -> None:
        for _ in range(YIELDS_MAX):
            if not self._states[self._wanted_at]:
                break
            time.sleep(YIELD_S)
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
