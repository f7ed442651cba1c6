"""Guest memory of the simulated KVM: memslots over RAM files, and what an access to them meets."""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from farfault_shim.kvm import abi
from farfault_shim.kvm.interface import MemoryRegion
from farfault_shim.kvm.nowait import NowaitInterface

PAGE_BYTES: Final = 4096
SLOTS_MAX: Final = 512
_WORD: Final = struct.Struct("<Q")
_FLAGS: Final = abi.MEM_LOG_DIRTY_PAGES | abi.MEM_READONLY


class Backing(NamedTuple):
    """A mapping of a whole file in this process, which memslots may point into."""

    hva: int
    size_bytes: int
    descriptor: int


class PageFault(Exception):  # noqa: N818 - what the processor calls it
    """The guest's access cannot be done now.

    Attributes:
        gpa, is_write, value: of the access; `value` is what a write would have stored.
        is_fetch: of an instruction.
        flags: for memory_fault.
        annotated: what KVM's interface says of it; None: nothing, the profile decides.
    """

    def __init__(
        self,
        gpa: int,
        *,
        is_write: bool = False,
        value: int = 0,
        is_fetch: bool = False,
        flags: int = 0,
        annotated: bool | None = None,
    ) -> None:
        super().__init__(f"{gpa:#x}")
        self.gpa = gpa
        self.is_write = is_write
        self.value = value
        self.is_fetch = is_fetch
        self.flags = flags
        self.annotated = annotated


class SimulatedSlot:
    """A memslot. A change makes a new one, as KVM does."""

    def __init__(self, region: MemoryRegion, file: OpenFile | None, file_offset: int) -> None:
        self.region = region
        self.file = file
        self.file_offset = file_offset
        self.end = region.gpa + region.size_bytes
        self.mapped = bytearray(region.size_bytes // PAGE_BYTES) if region.userfault_bitmap_hva else None
        """Of KVM Userfault: pages that the guest's processor reaches without asking the bitmap again."""


class OpenFile:
    """A RAM file. Its pages are there where it has data (lseek(2), SEEK_DATA)."""

    def __init__(self, backing: Backing) -> None:
        self.backing = backing
        self._descriptor = os.dup(backing.descriptor)
        self.memory = mmap.mmap(self._descriptor, backing.size_bytes, flags=mmap.MAP_SHARED)

    def has_page(self, offset: int) -> bool:
        offset &= -PAGE_BYTES
        try:
            return os.lseek(self._descriptor, offset, os.SEEK_DATA) == offset
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise

    def close(self) -> None:
        self.memory.close()
        os.close(self._descriptor)


class SimulatedMemory:
    """All memslots of a VM.

    Args:
        backings: where memslots may point.
        interfaces: NOWAIT interfaces that this KVM has.
        watched: a userfaultfd would watch the memory: pages without data are absent. Else they read as zero,
            unless the slot has a NOWAIT flag.
    """

    def __init__(
        self, backings: Sequence[Backing], interfaces: Sequence[NowaitInterface] = (), *, watched: bool = True
    ) -> None:
        self._files = [OpenFile(backing) for backing in backings]
        self._interfaces = tuple(interfaces)
        self._missing_flags = sum(interface.memslot_flag for interface in interfaces if not interface.has_bitmap)
        self.watched = watched
        self._self_memory = os.open(Path("/proc/self/mem"), os.O_RDONLY | os.O_CLOEXEC)
        self.slots: tuple[SimulatedSlot, ...] = ()
        self.info_enabled = False

    def set_region(self, region: MemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION; raises OSError as the kernel's does."""
        others = tuple(slot for slot in self.slots if slot.region.slot != region.slot)
        self._check(region, others)
        if region.size_bytes == 0:
            if len(others) == len(self.slots):
                raise OSError(errno.EINVAL, "no such slot")
            self.slots = others
            return
        file, offset = self._file_of(region)
        self.slots = (*others, SimulatedSlot(region, file, offset))

    def find(self, gpa: int, slots: Sequence[SimulatedSlot]) -> SimulatedSlot | None:
        """The slot of an address."""
        for slot in slots:
            if slot.region.gpa <= gpa < slot.end:
                return slot
        return None

    def reach(
        self, gpa: int, slots: Sequence[SimulatedSlot], *, is_write: bool, value: int = 0, is_fetch: bool = False
    ) -> tuple[mmap.mmap, int]:
        """Where the bytes of an address are, if the processor gets there.

        Raises:
            PageFault: the page is absent, or an interface says so.
        """
        slot = self.find(gpa, slots)
        if slot is None or slot.file is None:
            raise PageFault(gpa, is_write=is_write, value=value, is_fetch=is_fetch, annotated=False)
        offset = slot.file_offset + gpa - slot.region.gpa
        absent, flags, annotated = False, 0, None
        if slot.mapped is not None:
            absent, annotated = self._asks_bitmap(slot, slot.mapped, (gpa - slot.region.gpa) // PAGE_BYTES)
            flags = abi.MEMORY_EXIT_FLAG_USERFAULT if annotated else 0
        if not absent and (self.watched or slot.region.flags & self._missing_flags) and not slot.file.has_page(offset):
            absent, annotated = True, self._is_annotated(slot) if self._interfaces else None
        if absent:
            raise PageFault(gpa, is_write=is_write, value=value, is_fetch=is_fetch, flags=flags, annotated=annotated)
        return slot.file.memory, offset

    def is_present(self, gpa: int) -> bool:
        """A kernel's own access to the address would succeed."""
        slot = self.find(gpa, self.slots)
        if slot is None or slot.file is None:
            return False
        return not self.watched or slot.file.has_page(slot.file_offset + gpa - slot.region.gpa)

    def write(self, gpa: int, data: bytes) -> None:
        """KVM's own write to a present page."""
        slot = self.find(gpa, self.slots)
        assert slot is not None
        assert slot.file is not None
        offset = slot.file_offset + gpa - slot.region.gpa
        slot.file.memory[offset : offset + len(data)] = data

    def close(self) -> None:
        for file in self._files:
            file.close()
        os.close(self._self_memory)

    def _asks_bitmap(self, slot: SimulatedSlot, mapped: bytearray, page: int) -> tuple[bool, bool]:
        """Absent?, annotated?; a page that is let through stays so until the slot is set again."""
        if mapped[page]:
            return False, False
        try:
            data = os.pread(self._self_memory, _WORD.size, slot.region.userfault_bitmap_hva + page // 64 * 8)
            (word,) = _WORD.unpack(data)
        except (OSError, OverflowError, struct.error):
            return True, False  # a bad bitmap pointer gives a plain -EFAULT
        if word >> page % 64 & 1:
            return True, True
        mapped[page] = 1
        return False, False

    def _is_annotated(self, slot: SimulatedSlot) -> bool:
        for interface in self._interfaces:
            if slot.region.flags & interface.memslot_flag and not interface.has_bitmap:
                return self.info_enabled or not interface.needs_info_enabled
        return False

    def _check(self, region: MemoryRegion, others: Sequence[SimulatedSlot]) -> None:
        known = _FLAGS | sum(interface.memslot_flag for interface in self._interfaces)
        bitmap_flags = sum(interface.memslot_flag for interface in self._interfaces if interface.has_bitmap)
        if region.flags & ~known:
            raise OSError(errno.EINVAL, f"memslot flags {region.flags:#x}")
        if bool(region.flags & bitmap_flags) != bool(region.userfault_bitmap_hva):
            raise OSError(errno.EINVAL, "the flag of KVM Userfault and its bitmap go together")
        if not 0 <= region.slot < SLOTS_MAX or (region.gpa | region.size_bytes | region.hva) % PAGE_BYTES:
            raise OSError(errno.EINVAL, "slot number or alignment")
        for other in others:
            if region.size_bytes and region.gpa < other.end and other.region.gpa < region.gpa + region.size_bytes:
                raise OSError(errno.EEXIST, f"overlaps slot {other.region.slot}")

    def _file_of(self, region: MemoryRegion) -> tuple[OpenFile | None, int]:
        for file in self._files:
            offset = region.hva - file.backing.hva
            if offset >= 0 and offset + region.size_bytes <= file.backing.size_bytes:
                return file, offset
        return None, 0
