"""Memory in a file: tmpfs, hugetlbfs, memfd or a snapshot on disk.

Pages are read with pread(2), never through a mapping. A load from a hole of a mapped tmpfs file allocates the page
(measured: 1 MiB of holes read through mmap adds 2048 blocks, through pread none), and a file that was cut short or
a poisoned page is SIGBUS there but a plain error here. A first read costs the same either way: 26 us for 256 KiB.
"""

from __future__ import annotations

import errno
import os
from typing import Final

SEEK_FROM_PAGES: Final = 16
"""Holes are looked for from this many pages on; a shorter read costs less than lseek(2) saves."""


class FileRegion:
    """A RAM block that is a file, whole.

    Args:
        descriptor: open for reading; owned from now on.
        name: for people: the path or the name of the memfd.
        backing: ``tmpfs``, ``hugetlbfs``, ``memfd`` or ``file``.
        size_bytes: a multiple of `page_size_bytes`.
        page_size_bytes: the granule in which pages are counted and installed.
    """

    def __init__(self, descriptor: int, *, name: str, backing: str, size_bytes: int, page_size_bytes: int) -> None:
        self.descriptor = descriptor
        self.name = name
        self.backing = backing
        self.size_bytes = size_bytes
        self.page_size_bytes = page_size_bytes

    def read(self, first_page: int, page_count: int) -> bytes:
        size_bytes = page_count * self.page_size_bytes
        offset = first_page * self.page_size_bytes
        data = os.pread(self.descriptor, size_bytes, offset)
        if len(data) == size_bytes:
            return data
        return self._read_rest(data, offset, size_bytes)

    def _read_rest(self, data: bytes, offset: int, size_bytes: int) -> bytes:
        """A read that stopped early goes on: at an error, at the end of the file, or at nothing at all."""
        pieces = [data]
        read_bytes = len(data)
        while read_bytes < size_bytes:
            piece = os.pread(self.descriptor, size_bytes - read_bytes, offset + read_bytes)
            if not piece:
                raise OSError(errno.EIO, f"{self.name} is shorter than it was", self.name)
            pieces.append(piece)
            read_bytes += len(piece)
        return b"".join(pieces)

    def zero_pages_ahead(self, first_page: int, page_count: int) -> int:
        if page_count < SEEK_FROM_PAGES:
            return 0
        offset = first_page * self.page_size_bytes
        try:
            data_at = os.lseek(self.descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            # ENXIO: a hole up to the end; anything else: this file system does not tell.
            return page_count if error.errno == errno.ENXIO and offset < self._size_now() else 0
        return min((data_at - offset) // self.page_size_bytes, page_count)

    def _size_now(self) -> int:
        """A file that was cut short must not look like a hole."""
        return self.size_bytes if os.fstat(self.descriptor).st_size >= self.size_bytes else 0

    def identity(self) -> list[int]:
        """Device, inode, size and time of the last write: the same means that the memory is the same."""
        status = os.fstat(self.descriptor)
        return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns]

    def close(self) -> None:
        os.close(self.descriptor)
