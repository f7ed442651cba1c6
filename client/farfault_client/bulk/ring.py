"""Slots of memory that the bulk process fills and the pager installs from."""

from __future__ import annotations

import ctypes
import mmap
import os

from farfault_shim.uffd.userfaultfd import MappedBytes

SLOTS = 16
"""Answers that may lie between the two processes; then the bulk process stops reading and the network waits."""


class SlotRing:
    """A memfd cut into `SLOTS` equal slots, mapped here.

    Args:
        descriptor: of the memfd; it stays the caller's.
        slot_bytes: size of a slot.
    """

    def __init__(self, descriptor: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._memory = mmap.mmap(descriptor, SLOTS * slot_bytes)
        anchor = ctypes.c_char.from_buffer(self._memory)
        address = ctypes.addressof(anchor)
        del anchor
        view = memoryview(self._memory)
        self._slots = [
            MappedBytes(view[index * slot_bytes : (index + 1) * slot_bytes], address + index * slot_bytes)
            for index in range(SLOTS)
        ]

    def slot(self, index: int) -> MappedBytes:
        """Raises IndexError for a slot that cannot be."""
        if not 0 <= index < SLOTS:
            raise IndexError(f"slot {index} of {SLOTS}")
        return self._slots[index]


def make_memory(slot_bytes: int) -> int:
    """A new memfd for a ring; the caller closes it."""
    descriptor = os.memfd_create("farfault-bulk", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, SLOTS * slot_bytes)
    return descriptor
