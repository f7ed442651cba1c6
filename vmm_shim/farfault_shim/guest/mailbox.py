"""What the guest reports about itself, read from the VM's RAM file while it runs or is stopped.

Only ``pread``: a load through a mapping would fill a hole of the file and hide a missing page.
The guest's vCPUs write their mailboxes all the time: each number is true for some moment, not all for the same one,
unless the VM is stopped.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from farfault_shim.guest.addresses import MAILBOX_BYTES, histogram_address, mailbox_address

HISTOGRAM_BUCKETS = 64
_MAILBOX = struct.Struct("<16Q")
_HISTOGRAM = struct.Struct(f"<{HISTOGRAM_BUCKETS}Q")
CLASS_STEPS_BYTES = _HISTOGRAM.size
"""Offset of the steps of a skew's classes in the vCPU's histogram page."""
CLASSES_MAX = 64
_CLASS_STEPS = struct.Struct(f"<{CLASSES_MAX}Q")


class WorkerState(IntEnum):
    """What a vCPU's worker is doing."""

    BOOT = 0
    FILL = 1
    VERIFY = 2


@dataclass(frozen=True, slots=True)
class Mailbox:
    """What one vCPU reports, in the order of its mailbox.

    Attributes:
        passes: rounds completed in which every page was verified; with a skew, in which as many visits were made.
        touched: pages verified, in all rounds; it grows as long as the vCPU runs.
        errors: words that were not what this vCPU had written.
        clock_last_ns: kvmclock's time at the last reading.
        clock_backwards: readings earlier than the one before.
        clock_reads: readings; 0 where there is no kvmclock.
        clock_version: of the kvmclock page at the last reading; grows when KVM updates it.
        state: what the worker is doing.
        error_gpa: address of the first wrong word, 0 without errors.
        error_seen: what was there.
        error_expected: what should have been.
        clock_step_max_ns: longest time between two readings: how long the vCPU stood still, at most.
        access_max_ticks: slowest access to a page, in ticks of the TSC.
        filled: pages filled.
        boots: times that the vCPU started; more than 1: the guest was reset.
        access_ticks: ticks that all accesses in the histogram took together.
    """

    passes: int
    touched: int
    errors: int
    clock_last_ns: int
    clock_backwards: int
    clock_reads: int
    clock_version: int
    state: WorkerState
    error_gpa: int
    error_seen: int
    error_expected: int
    clock_step_max_ns: int
    access_max_ticks: int
    filled: int
    boots: int
    access_ticks: int

    @classmethod
    def unpack(cls, data: bytes) -> Mailbox:
        """From the bytes of a mailbox. Raises ValueError when they cannot be one."""
        fields = list(_MAILBOX.unpack_from(data))
        fields[7] = WorkerState(fields[7])
        return cls(*fields)


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long accesses to data pages took, as the guest saw it.

    Attributes:
        counts: 64 numbers; bucket b counts accesses of 2^b to 2^(b+1) - 1 ticks of the TSC.
    """

    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.counts)

    def percentile_ticks(self, percent: float) -> int:
        """An upper bound of the percentile in TSC ticks: the end of its bucket; 0 with nothing counted.

        Args:
            percent: from 0 to 100.
        """
        rank, seen = self.total * percent / 100, 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return (2 << bucket) - 1
        return 0

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def __sub__(self, other: Histogram) -> Histogram:
        """What was counted since `other`, an earlier reading of the same vCPU."""
        return Histogram(tuple(a - b for a, b in zip(self.counts, other.counts, strict=True)))


def read_mailboxes(ram: int | str | Path, vcpus: int, offset: int = 0) -> list[Mailbox]:
    """The mailboxes of the first vCPUs.

    Args:
        ram: descriptor or path of the VM's RAM file.
        vcpus: how many.
        offset: of guest physical address 0 in the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it ends before the mailboxes, or holds something else there.
    """
    with _opened(ram) as fd:
        data = _pread(fd, vcpus * MAILBOX_BYTES, offset + mailbox_address(0))
    return [Mailbox.unpack(data[vcpu * MAILBOX_BYTES :][:MAILBOX_BYTES]) for vcpu in range(vcpus)]


def read_histogram(ram: int | str | Path, vcpu: int, offset: int = 0) -> Histogram:
    """The latency histogram of one vCPU. Arguments and errors as for `read_mailboxes`."""
    with _opened(ram) as fd:
        return Histogram(_HISTOGRAM.unpack(_pread(fd, _HISTOGRAM.size, offset + histogram_address(vcpu))))


def read_class_steps(ram: int | str | Path, vcpu: int, offset: int = 0) -> tuple[int, ...]:
    """Steps that each class of a skewed guest has gone on one vCPU. Arguments and errors as for `read_mailboxes`."""
    with _opened(ram) as fd:
        place = offset + histogram_address(vcpu) + CLASS_STEPS_BYTES
        return _CLASS_STEPS.unpack(_pread(fd, _CLASS_STEPS.size, place))


def total_touched(mailboxes: Sequence[Mailbox]) -> int:
    """Pages verified by all vCPUs: the counter that goes on when the guest does."""
    return sum(mailbox.touched for mailbox in mailboxes)


@contextmanager
def _opened(ram: int | str | Path) -> Iterator[int]:
    if isinstance(ram, int):
        yield ram
        return
    fd = os.open(ram, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _pread(fd: int, size_bytes: int, offset: int) -> bytes:
    data = os.pread(fd, size_bytes, offset)
    if len(data) != size_bytes:
        raise ValueError(f"the RAM file ends at {offset + len(data):#x}, {size_bytes - len(data)} bytes too early")
    return data
