"""Memory that guests can be given: huge pages and tmpfs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from farfault_shim.sources.facts import Finding

HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages")
THP_SHMEM: Final = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
SHARED_MEMORY: Final = Path("/dev/shm")
MIB: Final = 1 << 20


def find_memory(
    huge_pages: Path = HUGE_PAGES, thp_shmem: Path = THP_SHMEM, shared_memory: Path = SHARED_MEMORY
) -> Iterator[tuple[str, Finding]]:
    """Name and finding of each kind of memory."""
    yield "tmpfs", _tmpfs(shared_memory)
    folders = sorted(huge_pages.glob("hugepages-*kB"), key=_size_kib) if huge_pages.is_dir() else []
    for folder in folders:
        yield f"huge pages of {_size_kib(folder) // 1024} MiB", _huge_pages(folder)
    if not folders:
        yield "huge pages", Finding(False, "the kernel has none")
    yield "THP in shmem", _thp(thp_shmem)


def _size_kib(folder: Path) -> int:
    match = re.search(r"(\d+)kB", folder.name)
    return int(match[1]) if match else 0


def _tmpfs(path: Path) -> Finding:
    try:
        space = os.statvfs(path)
    except OSError as error:
        return Finding(False, f"{path}: {error.strerror}", f"mount -t tmpfs tmpfs {path}")
    free_bytes = space.f_bavail * space.f_frsize
    return Finding(os.access(path, os.W_OK), f"{path}, {free_bytes // MIB} MiB free")


def _huge_pages(folder: Path) -> Finding:
    counts = {name: int((folder / f"{name}_hugepages").read_text()) for name in ("nr", "free", "resv")}
    detail = f"{counts['nr']} in the pool, {counts['free']} free, {counts['resv']} reserved"
    if counts["free"] > counts["resv"]:
        return Finding(True, detail)
    return Finding(False, detail, f"only for VMs on hugetlbfs: echo COUNT > {folder}/nr_hugepages")


def _thp(path: Path) -> Finding:
    try:
        text = path.read_text()
    except OSError:
        return Finding(False, "the kernel has none")
    chosen = re.search(r"\[(\w+)\]", text)
    value = chosen[1] if chosen else text.strip()
    return Finding(value not in ("never", "deny"), value)
