"""The initramfs format: cpio "newc", as the kernel's Documentation/driver-api/early-userspace/buffer-format.rst has it.

No I/O and no clock: the same entries give the same bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_ALIGNMENT_BYTES = 4


@dataclass(frozen=True)
class Entry:
    """One file of the archive, owned by root.

    Attributes:
        path: without a leading slash; its directories come before it.
        mode: type and permissions, as in ``st_mode``.
        data: contents of a file, target of a symbolic link; empty for others.
        device: major and minor number of a device node.
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """A directory that everyone may read."""
    return Entry(path, stat.S_IFDIR | 0o755)


def program(path: str, data: bytes) -> Entry:
    """An executable file."""
    return Entry(path, stat.S_IFREG | 0o755, data)


def text(path: str, lines: Iterable[str]) -> Entry:
    """A readable file of the lines."""
    return Entry(path, stat.S_IFREG | 0o644, "".join(f"{line}\n" for line in lines).encode())


def character_device(path: str, major: int, minor: int) -> Entry:
    """A device node, which only root may use."""
    return Entry(path, stat.S_IFCHR | 0o600, device=(major, minor))


def archive(entries: Iterable[Entry]) -> bytes:
    """The whole archive, with its trailer."""
    records = [_record(entry, inode) for inode, entry in enumerate(entries, start=1)]
    records.append(_record(Entry(_TRAILER, 0), inode=0))
    return b"".join(records)


def _record(entry: Entry, inode: int) -> bytes:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT_BYTES)
