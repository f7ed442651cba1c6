"""For the helper processes of `farfault serve` and `farfault receive`."""

from __future__ import annotations

import ctypes
import signal
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def end_with_parent() -> None:
    """From now on the kernel kills this process when the thread that started it ends, even while it is stopped.

    A helper sees its parent's end on its socket, but not while it is paused: then it would keep the port that the
    next server needs (prctl(2), PR_SET_PDEATHSIG). Call it first, from the main thread; the parent must have
    started it from its own main thread.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
