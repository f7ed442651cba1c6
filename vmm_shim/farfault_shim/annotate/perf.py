"""A perf event on a tracepoint of this thread: the newest address that passed it.

The ring is written backward and overwrites its oldest samples (perf_event_open(2), ``write_backward``), so
the newest is at the head however many came before. The preload library does the same in C (``annotate.c``).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
from pathlib import Path
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_shim.annotate.annotator import Annotator

SYS_PERF_EVENT_OPEN: Final = {"x86_64": 298, "aarch64": 241}
PERF_TYPE_TRACEPOINT: Final = 2
PERF_SAMPLE_RAW: Final = 1 << 10
PERF_ATTR_WRITE_BACKWARD: Final = 1 << 27
PERF_FLAG_FD_CLOEXEC: Final = 8
PERF_RECORD_SAMPLE: Final = 9
PARANOID: Final = Path("/proc/sys/kernel/perf_event_paranoid")

_ATTR: Final = struct.Struct("<IIQQQQQIIQ")
"""PERF_ATTR_SIZE_VER0: type, size, config, sample_period, sample_type, read_format, flag bits, wakeup_events,
bp_type, bp_addr."""
_HEADER: Final = struct.Struct("<IHH")
"""perf_event_header: type, misc, size."""
_DATA_HEAD_OFFSET: Final = 1024
"""Of data_head in struct perf_event_mmap_page."""
_RAW_SIZE_BYTES: Final = 4
_RING_PAGES: Final = 8
_RECORDS_MAX: Final = 8

_libc: Final = ctypes.CDLL(None, use_errno=True)


class SamplerUnavailableError(FarfaultError):
    """This process may not sample tracepoints."""


class TracepointSampler:
    """Samples one tracepoint of the calling thread; only that thread may ask for the newest.

    Args:
        annotator: tracepoint and field.

    Raises:
        SamplerUnavailableError: not permitted, or the event id is unknown.
    """

    def __init__(self, annotator: Annotator) -> None:
        self._annotator = annotator
        self._descriptor = _open_event(annotator.event_id)
        self._ring_bytes = _RING_PAGES * mmap.PAGESIZE
        try:
            self._memory = mmap.mmap(
                self._descriptor, mmap.PAGESIZE + self._ring_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ
            )
        except OSError as error:
            os.close(self._descriptor)
            raise SamplerUnavailableError(
                f"the ring of a perf event cannot be mapped: {error.strerror}",
                "raise kernel.perf_event_mlock_kb or RLIMIT_MEMLOCK",
            ) from error
        self._head = self._read_head()

    def newest(self) -> int | None:
        """The address of the newest sample since the last call; None where there was none."""
        head = self._read_head()
        position, older = head, self._head
        self._head = head
        for _ in range(_RECORDS_MAX):
            if position == older:
                return None
            kind, _, size_bytes = _HEADER.unpack(self._bytes(position, _HEADER.size))
            if size_bytes < _HEADER.size:
                return None
            if kind == PERF_RECORD_SAMPLE:
                field = position + _HEADER.size + _RAW_SIZE_BYTES + self._annotator.offset
                return int.from_bytes(self._bytes(field, self._annotator.size), "little")
            position += size_bytes
        return None

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)

    def _read_head(self) -> int:
        return int.from_bytes(self._memory[_DATA_HEAD_OFFSET : _DATA_HEAD_OFFSET + 8], "little")

    def _bytes(self, position: int, count: int) -> bytes:
        start = position % self._ring_bytes
        first = min(count, self._ring_bytes - start)
        begin = mmap.PAGESIZE + start
        return self._memory[begin : begin + first] + self._memory[mmap.PAGESIZE : mmap.PAGESIZE + count - first]


def _open_event(event_id: int) -> int:
    number = SYS_PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        raise SamplerUnavailableError(f"perf_event_open is not known on {platform.machine()}")
    attributes = _ATTR.pack(
        PERF_TYPE_TRACEPOINT, _ATTR.size, event_id, 1, PERF_SAMPLE_RAW, 0, PERF_ATTR_WRITE_BACKWARD, 0, 0, 0
    )
    descriptor = int(_libc.syscall(number, attributes, 0, -1, -1, ctypes.c_ulong(PERF_FLAG_FD_CLOEXEC)))
    if descriptor < 0:
        paranoid = PARANOID.read_text().strip() if PARANOID.exists() else "missing"
        raise SamplerUnavailableError(
            f"perf_event_open of tracepoint {event_id}: {os.strerror(ctypes.get_errno())} "
            f"(kernel.perf_event_paranoid={paranoid})",
            "run as root or with CAP_PERFMON (systemd: AmbientCapabilities=CAP_PERFMON), "
            "or sysctl kernel.perf_event_paranoid=-1",
        )
    return descriptor
