"""What a process that serves faults sets before it starts: the C library's heap, Python's collector, its priority.

glibc gives the top of the heap back to the kernel when more than twice the largest freed block is free there, which
is after every batch; the next one then takes a page fault for each of its pages. Measured on 64-page batches (parse,
read, zero test, checksum, packing): 339 us with glibc's own thresholds, 74 us with these.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from typing import Final

M_TRIM_THRESHOLD: Final = -1  # malloc.h
M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES_MAX: Final = 64 << 20
"""More than this free at the top of the heap goes back to the kernel."""
MAPPED_FROM_BYTES: Final = 32 << 20
"""glibc's largest: blocks below it come from the heap."""


def keep_freed_memory() -> bool:
    """Sets the thresholds for this process. False: this C library has no such thing, and nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES_MAX))


COLLECT_AFTER_OBJECTS: Final = 50_000
"""New objects between two collections of the young; Python's own is 700."""


def calm_collector() -> None:
    """Takes everything that the start has made out of the collector's sight, and lets it run seldom.

    Collections stop the event loop while a thread waits for its page; a fault makes no reference cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER_OBJECTS, 20, 100)


URGENT_NICE: Final = -10
"""Of the processes that a waiting thread waits for, where the kernel permits it (root, or CAP_SYS_NICE)."""
BULK_NICE: Final = 0
"""Of the processes that carry bulk beside them."""


def take_priority(nice: int) -> None:
    """Sets the calling thread's nice value; threads that it starts have the same. Not permitted: it stays as it is.

    A fault needs little time, but at once: on a host whose processors are busy with bulk and with vCPUs the median
    fault took 0.4 ms instead of 0.9 (two processors, 512 MiB, one vCPU, three runs each in turn).
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
