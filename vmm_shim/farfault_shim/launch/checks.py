"""What is checked before a VMM is started: mistakes that would show as a hang or a wrong guest later."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from farfault_cli.errors import FarfaultError, UsageError

from farfault_shim.launch.environment import MEMFD_PREFIX
from farfault_shim.unix_path import check_socket_path

RAM_PATHS_MAX: Final = 64
_ELF_HEADER: Final = struct.Struct("<4sBB10xHHIQQQIHHH")
"""Elf64_Ehdr up to e_phnum: magic, class, data, type, machine, version, entry, phoff, shoff, flags, ehsize,
phentsize, phnum."""
_ELF_CLASS_64: Final = 2
_ELF_LITTLE_ENDIAN: Final = 1
_PT_INTERP: Final = 3
_PROGRAM_HEADERS_MAX: Final = 4096
_STATIC_REMEDY: Final = "use a dynamically linked 64-bit VMM, or one that attaches by itself (docs/attach-protocol.md)"


def find_library(native: Path = Path(__file__).parent.parent / "_native") -> Path:
    """The preload library. Raises FarfaultError where it has not been built."""
    library = native / "libfarfault_shim.so"
    if not library.is_file():
        raise FarfaultError(f"the preload library {library} has not been built", "run: make native")
    return library.resolve()


def find_vmm(name: str) -> Path:
    """The VMM's program, checked: the dynamic linker will preload a library into it.

    Raises:
        UsageError: not found, a script, statically linked, or set-uid (the linker ignores LD_PRELOAD then).
    """
    found = shutil.which(name)
    if found is None:
        raise UsageError(f"{name} is not an executable file on PATH", "install it, or give its path")
    path = Path(found).absolute()
    with path.open("rb") as file:
        head = file.read(_ELF_HEADER.size)
        if head.startswith(b"#!"):
            raise UsageError(
                f"{path} is a script: its interpreter would take the library", "name the VMM binary itself"
            )
        if len(head) < _ELF_HEADER.size or not head.startswith(b"\x7fELF"):
            raise UsageError(f"{path} is not an ELF program", "name the VMM binary itself")
        _, bits, data, _, _, _, _, table, _, _, _, entry_bytes, count = _ELF_HEADER.unpack(head)
        if (bits, data) != (_ELF_CLASS_64, _ELF_LITTLE_ENDIAN):
            raise UsageError(f"{path} is not a 64-bit little-endian program", _STATIC_REMEDY)
        file.seek(table)
        headers = file.read(entry_bytes * min(count, _PROGRAM_HEADERS_MAX))
    kinds = {int.from_bytes(headers[at : at + 4], "little") for at in range(0, len(headers), max(1, entry_bytes))}
    if _PT_INTERP not in kinds:
        raise UsageError(f"{path} is statically linked: no library can be preloaded", _STATIC_REMEDY)
    _refuse_raised_privileges(path)
    return path


def _refuse_raised_privileges(path: Path) -> None:
    status = path.stat()
    raised = bool(status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid())
    raised |= bool(status.st_mode & stat.S_ISGID and status.st_gid != os.getegid())
    with contextlib.suppress(OSError):  # no such attribute
        raised |= bool(os.getxattr(path, "security.capability")) and os.geteuid() != 0
    if raised:
        raise UsageError(
            f"{path} is set-uid, set-gid or has file capabilities: the dynamic linker ignores LD_PRELOAD",
            "run it as the user that it would become, without these bits",
        )


def check_attach(path: Path) -> Path:
    """The receiver's socket, absolute. It need not exist yet: the library waits for it.

    Raises:
        UsageError: too long, its folder is missing, or a file that is no socket is there.
    """
    absolute = path.absolute()
    check_socket_path(absolute, "choose a shorter --attach")
    if not absolute.parent.is_dir():
        raise UsageError(f"{absolute.parent} is not a folder", "make it, or give the receiver's --attach path")
    if absolute.exists() and not absolute.is_socket():
        raise UsageError(f"{absolute} is not a socket", "give the receiver's --attach path")
    return absolute


def check_ram(names: Sequence[str]) -> list[str]:
    """The RAM regions as the library wants them: absolute, links resolved.

    Raises:
        UsageError: none or too many, a colon in a path, no folder, no file, or a file that holds data:
            pages that are there already are never fetched.
    """
    if not 1 <= len(names) <= RAM_PATHS_MAX:
        raise UsageError(f"{len(names)} RAM files; 1 to {RAM_PATHS_MAX} are supported")
    checked = [name if name.startswith(MEMFD_PREFIX) else _check_ram_file(name) for name in names]
    if len(set(checked)) != len(checked):
        raise UsageError("a RAM file is named twice")
    return checked


def _check_ram_file(name: str) -> str:
    path = Path(name)
    resolved = path.parent.resolve() / path.name if not path.exists() else path.resolve()
    if ":" in str(resolved):
        raise UsageError(f"a RAM path must not have a colon: {resolved}")
    if not resolved.parent.is_dir():
        raise UsageError(f"{resolved.parent} is not a folder", "RAM belongs on tmpfs or hugetlbfs, as in /dev/shm")
    if resolved.exists():
        if not resolved.is_file():
            raise UsageError(
                f"{resolved} is not a file", "--ram takes the file that the memory backend names in mem-path"
            )
        blocks = resolved.stat().st_blocks
        if blocks:
            raise UsageError(
                f"{resolved} already holds {blocks // 2} KiB; pages that are there are never fetched",
                f"remove it, the VMM makes it anew: rm {resolved}",
            )
    return str(resolved)


def ram_not_on_command_line(ram: Sequence[str], names: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """The RAM paths, as given, that no argument of the VMM mentions; memfds have no path."""
    return [
        name
        for name, resolved in zip(names, ram, strict=True)
        if not name.startswith(MEMFD_PREFIX) and not any(name in text or resolved in text for text in arguments)
    ]
