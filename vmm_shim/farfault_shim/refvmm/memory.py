"""Guest RAM: one file, mapped once for the VMM and, for stock NOWAIT exits, a second time for KVM."""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from farfault_cli.errors import UsageError

from farfault_shim.attach.wire import Slot
from farfault_shim.guest.parameters import FOUR_GIB, Machine
from farfault_shim.layout import PAGE_SIZES_BYTES, FlatOffset, Gpa, Hva

RAM_BYTES_MIN: Final = 4 << 20
BASE_PAGE_BYTES: Final = 4096
MADV_POPULATE_WRITE: Final = 23
"""Linux 5.14, madvise(2)."""


class Mapping:
    """A shared mapping of the whole RAM file."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.memory = mmap.mmap(descriptor, size_bytes, flags=mmap.MAP_SHARED)
        self.hva = Hva(ctypes.addressof(ctypes.c_char.from_buffer(self.memory)))

    def populate(self, offset: int, size_bytes: int) -> None:
        """Makes pages that the file has present in this mapping.

        Raises:
            OSError: a page is absent from the file and a userfaultfd watches it.
        """
        self.memory.madvise(MADV_POPULATE_WRITE, offset, size_bytes)

    def close(self) -> None:
        self.memory.close()


class SlotPlace(NamedTuple):
    """A part of RAM: where the guest sees it, and where it lies in the file."""

    gpa: Gpa
    offset: FlatOffset
    size_bytes: int


class GuestMemory:
    """RAM of a VM. The file stays when the VM ends.

    Args:
        path: of the file; made where it is missing, else it must have the size.
        size_bytes: a multiple of the file's page size, at least 4 MiB.
        machine: how RAM is split around the PCI hole.

    Raises:
        UsageError: the file cannot be opened or has another size.
    """

    def __init__(self, path: Path, size_bytes: int, machine: Machine) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.machine = machine
        self.descriptor = _open(path, size_bytes)
        block_bytes = os.fstatvfs(self.descriptor).f_bsize
        self.page_size_bytes = block_bytes if block_bytes in PAGE_SIZES_BYTES else BASE_PAGE_BYTES
        if size_bytes % self.page_size_bytes:
            os.close(self.descriptor)
            raise UsageError(
                f"{size_bytes} bytes of RAM are not whole pages of {self.page_size_bytes}", "choose another --size"
            )
        self.base = Mapping(self.descriptor, size_bytes)
        self.alias: Mapping | None = None
        low_bytes = machine.low_ram_bytes(size_bytes)
        places = [SlotPlace(Gpa(0), FlatOffset(0), low_bytes)]
        if size_bytes > low_bytes:
            places.append(SlotPlace(Gpa(FOUR_GIB), FlatOffset(low_bytes), size_bytes - low_bytes))
        self.places = tuple(places)

    def add_alias(self) -> Mapping:
        """Maps the file a second time, for KVM only: never inherited by a child."""
        assert self.alias is None
        self.alias = Mapping(self.descriptor, self.size_bytes)
        self.alias.memory.madvise(mmap.MADV_DONTFORK)
        return self.alias

    @property
    def for_kvm(self) -> Mapping:
        """The mapping that memslots point to."""
        return self.alias or self.base

    def slots(self) -> list[Slot]:
        """The memslots as the attach protocol describes them."""
        return [Slot(number, 0, place.gpa, place.size_bytes, place.offset) for number, place in enumerate(self.places)]

    def offset_of(self, gpa: int, size_bytes: int = 1) -> FlatOffset | None:
        """Place in the file of ``[gpa, gpa + size_bytes)``; None where that is not wholly RAM."""
        for place in self.places:
            if place.gpa <= gpa and gpa + size_bytes <= place.gpa + place.size_bytes:
                return FlatOffset(place.offset + gpa - place.gpa)
        return None

    def write(self, gpa: int, data: bytes) -> None:
        """Puts bytes into RAM by the file: for a VM that has not started."""
        offset = self.offset_of(gpa, len(data))
        assert offset is not None
        os.pwrite(self.descriptor, data, offset)

    def close(self) -> None:
        """Unmaps. No vCPU may run any more."""
        if self.alias is not None:
            self.alias.close()
        self.base.close()
        os.close(self.descriptor)


def _open(path: Path, size_bytes: int) -> int:
    if size_bytes < RAM_BYTES_MIN:
        raise UsageError(f"{size_bytes} bytes of RAM are too few", f"give --size at least {RAM_BYTES_MIN >> 20}MiB")
    with _usage_error(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size not in (0, size_bytes):
        os.close(descriptor)
        raise UsageError(
            f"{path} is not a file of {size_bytes} bytes, but of {status.st_size}",
            "give --size the size of the file, or name another file",
        )
    with _usage_error(path):
        os.ftruncate(descriptor, size_bytes)
    return descriptor


@contextmanager
def _usage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be RAM: {error.strerror}", "name a file on tmpfs, as in /dev/shm") from error
