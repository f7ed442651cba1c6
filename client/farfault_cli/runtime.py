"""What a process that serves faults sets before it starts: the C library's heap, Python's collector, its time slice.

glibc gives the top of the heap back to the kernel when more than twice the largest freed block is free there, which
is after every batch; the next one then takes a page fault for each of its pages. Measured on 64-page batches (parse,
read, zero test, checksum, packing): 339 us with glibc's own thresholds, 74 us with these.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import struct
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


URGENT_SLICE_NS: Final = 100_000
"""Of the processes that a waiting thread waits for: the shortest that the kernel takes."""
BULK_SLICE_NS: Final = 10_000_000
"""Of the processes that carry bulk beside them."""
URGENT_NICE: Final = -10
"""Of urgent processes where the kernel knows no slices, if it permits this (root, or CAP_SYS_NICE)."""
BULK_NICE: Final = 0
"""Of bulk there: it is started by an urgent process."""

_SCHED_ATTR: Final = struct.Struct("=IIQiIQQQII")  # sched_setattr(2): struct sched_attr
_SYS_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
_SYS_SCHED_GETATTR: Final = {"x86_64": 315, "aarch64": 275}


def be_urgent() -> None:
    """The calling thread, and threads that it starts, run at once when they wake, and take no more than their share.

    A fault needs little time, but at once. A thread with a short slice is scheduled before those with longer ones
    (EEVDF, Linux 6.12), so that demand never waits for bulk, and bulk still gets its half of a busy processor. With
    nice values instead, either demand waited (all at 0: the median fault took 1.1 ms) or bulk starved whenever faults
    never stopped (-10 beside 0: 0.35 ms, but the whole move took 2 to 8 s); with slices 0.4 ms and 1.6 to 1.9 s (two
    processors, 1 GiB, one vCPU, three runs each in turn).
    """
    if not _take_slice(URGENT_SLICE_NS):
        _take_nice(URGENT_NICE)


def be_bulk() -> None:
    """The calling thread, and threads that it starts, let urgent ones go first."""
    if not _take_slice(BULK_SLICE_NS):
        _take_nice(BULK_NICE)


def _take_nice(nice: int) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)


def _take_slice(slice_ns: int) -> bool:
    """Asks for a time slice. False: this kernel knows none for ordinary threads."""
    numbers = (_SYS_SCHED_SETATTR.get(platform.machine()), _SYS_SCHED_GETATTR.get(platform.machine()))
    if None in numbers:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    set_attr, get_attr = numbers
    libc = ctypes.CDLL(None)
    attributes = ctypes.create_string_buffer(
        _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0, 0, 0), _SCHED_ATTR.size
    )
    if libc.syscall(set_attr, 0, attributes, 0):
        return False
    if libc.syscall(get_attr, 0, attributes, _SCHED_ATTR.size, 0):
        return False
    return bool(_SCHED_ATTR.unpack(attributes.raw)[5] == slice_ns)
