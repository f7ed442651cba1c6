"""Opens what the command line names as RAM: a file, or the memory of a running process."""

from __future__ import annotations

import ctypes
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from farfault_cli.errors import UsageError

from farfault_server.memory.file_region import FileRegion

TMPFS_MAGIC: Final = 0x01021994  # linux/magic.h
HUGETLBFS_MAGIC: Final = 0x958458F6
BASE_PAGE_BYTES: Final = 4096
PAGE_SIZES_BYTES: Final = (BASE_PAGE_BYTES, 2 << 20)
"""Sizes that are served. A page of 1 GiB would be one message: too large for any bound on memory."""
REGIONS_MAX: Final = 64
DESCRIPTORS_SHOWN_MAX: Final = 8

_libc = ctypes.CDLL(None, use_errno=True)


class FileSystem(NamedTuple):
    """Where a file lives: the magic number of the file system and its block size (hugetlbfs: the page size)."""

    magic: int
    block_size_bytes: int


def file_system(descriptor: int) -> FileSystem:
    """fstatfs(2); Python's os module leaves the magic number out."""
    buffer = (ctypes.c_long * 32)()  # struct statfs is 120 bytes on x86-64; f_type and f_bsize come first
    if _libc.fstatfs(descriptor, buffer):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return FileSystem(buffer[0] & 0xFFFFFFFF, buffer[1])


def open_ram(specification: str, pid: int | None = None) -> FileRegion:
    """Opens one ``--ram``.

    Args:
        specification: a path; with `pid` also ``fd:N`` or ``memfd=NAME``.
        pid: the process whose memory it is; its descriptor is opened anew through /proc.

    Raises:
        UsageError: with what to do about it.
    """
    path, name = (Path(specification), specification) if pid is None else _in_process(specification, pid)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _cannot_open(error, name, pid) from error
    try:
        return _region(descriptor, name)
    except BaseException:
        os.close(descriptor)
        raise


def region_of_descriptor(descriptor: int, *, name: str, backing: str, page_size_bytes: int) -> FileRegion:
    """The same region in another process of the server, from an inherited descriptor."""
    size_bytes = os.fstat(descriptor).st_size
    return FileRegion(descriptor, name=name, backing=backing, size_bytes=size_bytes, page_size_bytes=page_size_bytes)


def _region(descriptor: int, name: str) -> FileRegion:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{name} is not a file", "name a RAM file, a memfd, or a snapshot of memory")
    magic, block_size_bytes = file_system(descriptor)
    page_size_bytes = block_size_bytes if magic == HUGETLBFS_MAGIC else BASE_PAGE_BYTES
    if page_size_bytes not in PAGE_SIZES_BYTES:
        raise UsageError(
            f"{name} has pages of {page_size_bytes >> 20} MiB, which are not served",
            "back the VM with 2 MiB or 4 KiB pages",
        )
    if status.st_size == 0 or status.st_size % page_size_bytes:
        raise UsageError(
            f"the size of {name} is {status.st_size} bytes, not a positive multiple of its page size {page_size_bytes}",
            "check that this is the RAM file of the VM and that it was written whole",
        )
    return FileRegion(
        descriptor,
        name=name,
        backing=_backing(descriptor, magic),
        size_bytes=status.st_size,
        page_size_bytes=page_size_bytes,
    )


def _backing(descriptor: int, magic: int) -> str:
    if str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("/memfd:"):
        return "memfd"
    return {TMPFS_MAGIC: "tmpfs", HUGETLBFS_MAGIC: "hugetlbfs"}.get(magic, "file")


def _cannot_open(error: OSError, name: str, pid: int | None) -> UsageError:
    if isinstance(error, PermissionError):
        owner = f"process {pid}" if pid is not None else "the file"
        return UsageError(f"no permission to read {name}", f"run as the user that owns {owner}, or as root")
    if isinstance(error, FileNotFoundError):
        return UsageError(
            f"{name} does not exist",
            "give the path of the VM's memory-backend-file; for a memfd use --pid PID --ram memfd=NAME",
        )
    return UsageError(f"cannot open {name}: {error.strerror}")


def _in_process(specification: str, pid: int) -> tuple[Path, str]:
    """``(path under /proc, name for people)`` of a descriptor of another process."""
    directory = Path(f"/proc/{pid}/fd")
    if match := re.fullmatch(r"fd:(\d+)", specification):
        return directory / match[1], f"descriptor {match[1]} of process {pid}"
    wanted = specification
    if specification.startswith("memfd="):
        wanted = "/memfd:" + specification.removeprefix("memfd=")
    try:
        links = list(_links(directory))
    except FileNotFoundError:
        raise UsageError(f"there is no process {pid}", "give the process id of the running VMM") from None
    except PermissionError:
        raise UsageError(
            f"no permission to look at process {pid}", "run as the user that runs the VMM, or as root"
        ) from None
    found: dict[tuple[int, int], Path] = {}
    for path, target in links:
        if target.removesuffix(" (deleted)") == wanted:
            status = path.stat()
            found.setdefault((status.st_dev, status.st_ino), path)
    if len(found) == 1:
        return found.popitem()[1], f"{wanted.removeprefix('/')} of process {pid}"
    candidates = [
        f"fd:{path.name} is {target}" for path, target in links if target.startswith(("/memfd:", "/dev/shm/"))
    ]
    listed = "; ".join(candidates[:DESCRIPTORS_SHOWN_MAX]) or "no memfd and no file in /dev/shm"
    problem = "has no open file" if not found else f"has {len(found)} files"
    raise UsageError(f"process {pid} {problem} {wanted}", f"it has: {listed}")


def _links(directory: Path) -> Iterator[tuple[Path, str]]:
    for path in directory.iterdir():
        try:
            yield path, str(path.readlink())
        except FileNotFoundError:
            continue  # closed meanwhile
