"""A userfaultfd: made here, or received from a VMM.

The calls act on the address space of the process that made the descriptor, whoever holds it, so a
receiver installs pages into a VMM that handed its descriptor over. See userfaultfd(2), ioctl_userfaultfd(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import platform
from pathlib import Path
from typing import NamedTuple, Self

from farfault_cli.errors import FarfaultError

from farfault_shim.uffd import abi

_libc = ctypes.CDLL(None, use_errno=True)
_bytes_address = ctypes.pythonapi.PyBytes_AsString
_bytes_address.restype = ctypes.c_void_p
_bytes_address.argtypes = [ctypes.py_object]


class Fault(NamedTuple):
    """A thread sleeps on a missing page."""

    address: int
    flags: int
    thread_id: int


class Removed(NamedTuple):
    """``[start, end)`` was given back by madvise, fallocate or munmap; it reads as zero from now on."""

    start: int
    end: int


class CopyResult(NamedTuple):
    """How far a copy came: bytes in place, and the errno that ended it (0: none)."""

    done_bytes: int
    error: int


class MappedBytes:
    """Bytes at a fixed address, part of a mapping that outlives them: what `Userfaultfd.copy` installs without a copy.

    Args:
        view: of the bytes.
        address: of the first, in this process.
    """

    __slots__ = ("address", "view")

    def __init__(self, view: memoryview, address: int) -> None:
        self.view = view
        self.address = address

    @classmethod
    def allocate(cls, size_bytes: int) -> Self:
        """Memory of its own, which lives as long as `view` does."""
        memory = mmap.mmap(-1, size_bytes)
        return cls(memoryview(memory), ctypes.addressof(ctypes.c_char.from_buffer(memory)))

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self.view[part])


class UserfaultfdUnavailableError(FarfaultError):
    """This process may not make a userfaultfd."""


class Userfaultfd:
    """A userfaultfd descriptor; owns it.

    Args:
        descriptor: of a userfaultfd.

    Raises:
        ValueError: the descriptor is something else.
    """

    def __init__(self, descriptor: int) -> None:
        target = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if target != "anon_inode:[userfaultfd]":
            raise ValueError(f"descriptor is {target}, not a userfaultfd")
        self._descriptor = descriptor
        self._copy = bytearray(abi.COPY.size)
        self._zeropage = bytearray(abi.ZEROPAGE.size)
        self._events = bytearray()  # where events are read into

    @classmethod
    def create(cls, features: int = 0, device_fd: int | None = None) -> Self:
        """Makes one, by the system call or else by ``/dev/userfaultfd``, and negotiates features.

        Args:
            features: UFFD_FEATURE_ bits.
            device_fd: an inherited descriptor of ``/dev/userfaultfd``, used instead of either.

        Raises:
            UserfaultfdUnavailableError: not permitted, or the kernel lacks a feature.
        """
        if device_fd is None:
            descriptor = _create_descriptor()
        else:
            descriptor = fcntl.ioctl(device_fd, abi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(descriptor, abi.UFFDIO_API, bytearray(abi.API.pack(abi.UFFD_API, features, 0)))
        except OSError as error:
            os.close(descriptor)
            raise UserfaultfdUnavailableError(
                f"the kernel refuses userfaultfd features {features:#x}: {error.strerror}",
                "a kernel of 5.7 or newer has all that farfault asks for",
            ) from error
        return cls(descriptor)

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        """Closes the descriptor. The last close unregisters its ranges: missing pages then read as zero."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def register(self, address: int, size_bytes: int) -> None:
        """Missing pages of the range are reported from now on."""
        request = abi.REGISTER.pack(address, size_bytes, abi.UFFDIO_REGISTER_MODE_MISSING, 0)
        fcntl.ioctl(self._descriptor, abi.UFFDIO_REGISTER, bytearray(request))

    def unregister(self, address: int, size_bytes: int) -> None:
        """The kernel takes the range over: waiting threads wake, missing pages read as zero."""
        fcntl.ioctl(self._descriptor, abi.UFFDIO_UNREGISTER, bytearray(abi.RANGE.pack(address, size_bytes)))

    def wake(self, address: int, size_bytes: int) -> None:
        """Wakes the threads that sleep in the range; they look again."""
        fcntl.ioctl(self._descriptor, abi.UFFDIO_WAKE, bytearray(abi.RANGE.pack(address, size_bytes)))

    def copy(self, address: int, data: bytes | MappedBytes, data_offset: int, size_bytes: int) -> CopyResult:
        """Installs ``data[data_offset : data_offset + size_bytes]`` at an address and wakes who sleeps there.

        One ioctl, and one copy of the bytes, whatever the number of pages. The GIL is released in it.
        """
        source = (_bytes_address(data) if isinstance(data, bytes) else data.address) + data_offset
        abi.COPY.pack_into(self._copy, 0, address, source, size_bytes, 0, 0)
        return self._run(abi.UFFDIO_COPY, self._copy, abi.COPY.size - 8, size_bytes)

    def zeropage(self, address: int, size_bytes: int) -> CopyResult:
        """Installs zero pages and wakes who sleeps there. Not for hugetlbfs (EINVAL)."""
        abi.ZEROPAGE.pack_into(self._zeropage, 0, address, size_bytes, 0, 0)
        return self._run(abi.UFFDIO_ZEROPAGE, self._zeropage, abi.ZEROPAGE.size - 8, size_bytes)

    def read_events(self, events_max: int = 64) -> list[Fault | Removed]:
        """Takes waiting events off the descriptor, which must be O_NONBLOCK; empty: there is none."""
        wanted_bytes = abi.MESSAGE_BYTES * events_max
        if len(self._events) < wanted_bytes:
            self._events = bytearray(wanted_bytes)
        data = self._events
        try:
            size_bytes = os.readv(self._descriptor, (data,))
        except BlockingIOError:
            return []
        return parse_events(memoryview(data)[:size_bytes])

    def _run(self, request: int, argument: bytearray, done_at: int, size_bytes: int) -> CopyResult:
        try:
            fcntl.ioctl(self._descriptor, request, argument)
        except OSError as error:
            # The kernel says how far it came, or puts a negated errno into the same field.
            done = int.from_bytes(argument[done_at : done_at + 8], "little", signed=True)
            return CopyResult(max(0, done), error.errno or errno.EIO)
        return CopyResult(size_bytes, 0)


def parse_events(data: memoryview) -> list[Fault | Removed]:
    """The events in what was read off a userfaultfd: whole messages."""
    events: list[Fault | Removed] = []
    for offset in range(0, len(data), abi.MESSAGE_BYTES):
        event = data[offset]
        if event == abi.EVENT_PAGEFAULT:
            _, flags, address, thread_id = abi.MESSAGE.unpack_from(data, offset)
            events.append(Fault(address, flags, thread_id))
        elif event in (abi.EVENT_REMOVE, abi.EVENT_UNMAP):
            _, start, end = abi.MESSAGE_RANGE.unpack_from(data, offset)
            events.append(Removed(start, end))
    return events


def _create_descriptor() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    number = abi.SYS_USERFAULTFD.get(platform.machine())
    if number is not None:
        descriptor = int(_libc.syscall(number, flags))
        if descriptor >= 0:
            return descriptor
    try:
        device = os.open(abi.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        setting = Path("/proc/sys/vm/unprivileged_userfaultfd")
        value = setting.read_text().strip() if setting.exists() else "missing"
        raise UserfaultfdUnavailableError(
            f"userfaultfd is not permitted (vm.unprivileged_userfaultfd={value}; {abi.DEVICE}: {error.strerror})",
            f"run as root, or give this user {abi.DEVICE} (chown or an ACL), or sysctl vm.unprivileged_userfaultfd=1",
        ) from error
    try:
        return fcntl.ioctl(device, abi.USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)
