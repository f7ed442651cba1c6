"""Memory of this process under a userfaultfd, for tests on the real kernel."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from farfault_shim.uffd import abi
from farfault_shim.uffd.userfaultfd import Userfaultfd, UserfaultfdUnavailableError

PAGE = 4096
HUGE = 2 << 20
FEATURES = abi.FEATURE_MISSING_SHMEM | abi.FEATURE_EVENT_REMOVE | abi.FEATURE_THREAD_ID
WAIT_S = 10.0
NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
libc = ctypes.CDLL(None, use_errno=True)


def make_userfaultfd(features: int = FEATURES) -> Userfaultfd:
    """Skips the test where this process may not."""
    try:
        return Userfaultfd.create(features)
    except UserfaultfdUnavailableError as error:
        pytest.skip(str(error))


class Memory:
    """A shared mapping of a file descriptor, which it does not own."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.map = mmap.mmap(descriptor, size_bytes)
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._anchor)

    def close(self) -> None:
        self._anchor = None
        self.map.close()


@contextmanager
def memfd_memory(size_bytes: int, flags: int = 0) -> Iterator[tuple[int, Memory]]:
    """A memfd and one mapping of it."""
    descriptor = os.memfd_create("farfault-test-ram", os.MFD_CLOEXEC | flags)
    os.ftruncate(descriptor, size_bytes)
    memory = Memory(descriptor, size_bytes)
    try:
        yield descriptor, memory
    finally:
        memory.close()
        os.close(descriptor)


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Reserves 2 MiB pages on top of what the host has, and gives them back."""
    try:
        before = int(NR_HUGEPAGES.read_text())
        NR_HUGEPAGES.write_text(str(before + count))
    except OSError as error:
        pytest.skip(f"cannot reserve huge pages: {error}")
    try:
        if int(NR_HUGEPAGES.read_text()) < before + count:
            pytest.skip(f"the host has no {count} free huge pages")
        yield
    finally:
        NR_HUGEPAGES.write_text(str(before))


def until(condition: Callable[[], bool]) -> None:
    """Polls, bounded."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.001)


def pattern(first: int, count: int, page_bytes: int = PAGE) -> bytes:
    """Pages that all differ."""
    return b"".join((page + 1).to_bytes(8, "little") * (page_bytes // 8) for page in range(first, first + count))
