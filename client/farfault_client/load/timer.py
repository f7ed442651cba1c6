"""A timer of microseconds: event loops round their timers to whole milliseconds, a fault's due time must not be.

timerfd_create(2), Linux 2.6.25; Python's own binding comes with 3.13.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Callable

TFD_TIMER_ABSTIME = 1  # sys/timerfd.h
TFD_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
ITIMERSPEC = struct.Struct("@qqqq")  # interval and value, each seconds and nanoseconds

_libc = ctypes.CDLL(None, use_errno=True)


class Timer:
    """Calls back once CLOCK_MONOTONIC has reached the time that was set last. Needs a running event loop.

    Args:
        callback: called on the event loop.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._set_for: float | None = None
        self._descriptor = _libc.timerfd_create(time.CLOCK_MONOTONIC, TFD_FLAGS)
        if self._descriptor < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._loop.add_reader(self._descriptor, self._fired)

    def set(self, at: float | None) -> None:
        """The next call is at this time, in seconds; one that has passed: at once; None: never."""
        if at == self._set_for:
            return
        self._set_for = at
        nanoseconds = max(1, int(at * 1e9)) if at is not None else 0
        value = ITIMERSPEC.pack(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
        if _libc.timerfd_settime(self._descriptor, TFD_TIMER_ABSTIME, value, None):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """No more calls."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _fired(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 8)
            self._set_for = None
            self._callback()
