"""Installers put fetched pages into a VMM's memory, whole runs at a time.

`UffdInstaller` copies through the alias mapping where there is one (that maps the page for KVM as well),
else through the VMM's own. `FileInstaller` writes into the RAM file: the simulated KVM asks the file
whether a page is there.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from farfault_shim.attach.wire import HandOver, HandOverRegion
from farfault_shim.layout import Layout, PageIndex, PageRun, Region
from farfault_shim.uffd.userfaultfd import CopyResult, MappedBytes, Userfaultfd

BASE_PAGE_BYTES = 4096
EXISTING_PAGES_MAX = 1 << 20
"""Pages of one run that may turn out to exist one by one; a run is never longer."""
ZERO_COPY_BYTES = 2 << 20
"""Zero pages of hugetlbfs are copied from a buffer of this size, made at first use."""


@dataclass(slots=True)
class InstallResult:
    """What became of a run: together, `installed` and `existed` cover its front without gaps."""

    installed: list[PageRun] = field(default_factory=list)
    existed: list[PageRun] = field(default_factory=list)


class InstallError(Exception):
    """An installation ended early; `partial` says how far it came."""

    def __init__(self, message: str, partial: InstallResult) -> None:
        super().__init__(message)
        self.partial = partial


class DrainEvents(InstallError):  # noqa: N818 - names what the caller must do
    """EAGAIN: read the userfaultfd's events, then install the rest."""


class VmmGone(InstallError):  # noqa: N818
    """ESRCH: the process whose memory it was has exited."""


class NoSpace(InstallError):  # noqa: N818
    """ENOSPC or ENOMEM: the destination has no memory left for the page."""


class Installer(Protocol):
    """Puts runs of pages, each within one region, into memory."""

    def install(self, run: PageRun, data: bytes | MappedBytes, data_offset: int) -> InstallResult:
        """Installs ``run.count`` pages whose bytes begin at `data_offset`.

        Raises:
            DrainEvents, VmmGone, NoSpace: with the part that was done.
        """

    def install_zero(self, run: PageRun) -> InstallResult:
        """Installs zero pages; raises as `install`."""

    def wake(self, run: PageRun) -> None:
        """Wakes threads that sleep on the VMM's own mapping of these pages."""

    def page_of_fault(self, address: int) -> PageIndex | None:
        """The page of a fault address, or None where it lies in no region."""

    def pages_of_range(self, start: int, end: int) -> list[PageRun]:
        """The pages that lie wholly within an address range, a run for each region."""

    def unregister(self) -> None:
        """Gives all memory back to the kernel: what is missing reads as zero."""


class UffdInstaller:
    """Installs by UFFDIO_COPY and UFFDIO_ZEROPAGE.

    Args:
        layout: guest memory.
        handover: the VMM's addresses; one region each of `layout`.
        uffd: blocking userfaultfd of the VMM's own mappings.
        alias_uffd: SIGBUS userfaultfd of the alias mappings that KVM uses, or None.
    """

    def __init__(self, layout: Layout, handover: HandOver, uffd: Userfaultfd, alias_uffd: Userfaultfd | None) -> None:
        self._layout = layout
        self._uffd = uffd
        self._alias_uffd = alias_uffd
        self._regions = handover.regions
        by_base = sorted(zip(handover.regions, layout.regions, strict=True), key=lambda pair: pair[0].base_hva)
        self._bases = [ours.base_hva for ours, _ in by_base]
        self._by_base = by_base
        self._zeros = b""

    def install(self, run: PageRun, data: bytes | MappedBytes, data_offset: int) -> InstallResult:
        region, uffd, address = self._target(run.first)
        page_size = region.page_size_bytes

        def copy(done_pages: int) -> CopyResult:
            done_bytes = done_pages * page_size
            size_bytes = run.count * page_size - done_bytes
            return uffd.copy(address + done_bytes, data, data_offset + done_bytes, size_bytes)

        return _repeat(copy, run, page_size)

    def install_zero(self, run: PageRun) -> InstallResult:
        region, uffd, address = self._target(run.first)
        page_size = region.page_size_bytes
        if page_size == BASE_PAGE_BYTES:
            return _repeat(
                lambda done: uffd.zeropage(address + done * page_size, (run.count - done) * page_size),
                run,
                page_size,
            )
        if len(self._zeros) < page_size:
            self._zeros = bytes(page_size)
        return _repeat(lambda done: uffd.copy(address + done * page_size, self._zeros, 0, page_size), run, page_size)

    def wake(self, run: PageRun) -> None:
        if self._alias_uffd is None:
            return  # the copy itself has woken them
        region = self._layout.region_of_page(run.first)
        base = self._regions[region.index].base_hva + (run.first - region.first_page) * region.page_size_bytes
        self._uffd.wake(base, run.count * region.page_size_bytes)

    def page_of_fault(self, address: int) -> PageIndex | None:
        index = bisect_right(self._bases, address) - 1
        if index < 0:
            return None
        ours, region = self._by_base[index]
        offset = address - ours.base_hva
        if offset >= region.size_bytes:
            return None
        return PageIndex(region.first_page + offset // region.page_size_bytes)

    def pages_of_range(self, start: int, end: int) -> list[PageRun]:
        runs = []
        for ours, region in self._by_base:
            first_byte = max(start, ours.base_hva) - ours.base_hva
            end_byte = min(end, ours.base_hva + region.size_bytes) - ours.base_hva
            first = -(-first_byte // region.page_size_bytes)
            count = end_byte // region.page_size_bytes - first
            if count > 0:
                runs.append(PageRun(PageIndex(region.first_page + first), count))
        return runs

    def unregister(self) -> None:
        for ours in self._regions:
            if self._alias_uffd is not None:
                self._alias_uffd.unregister(ours.alias_hva, ours.size_bytes)
            self._uffd.unregister(ours.base_hva, ours.size_bytes)

    def _target(self, page: PageIndex) -> tuple[Region, Userfaultfd, int]:
        region = self._layout.region_of_page(page)
        ours: HandOverRegion = self._regions[region.index]
        offset = (page - region.first_page) * region.page_size_bytes
        if self._alias_uffd is not None:
            return region, self._alias_uffd, ours.alias_hva + offset
        return region, self._uffd, ours.base_hva + offset


class _Copy(Protocol):
    def __call__(self, done_pages: int, /) -> CopyResult: ...


def _repeat(copy: _Copy, run: PageRun, page_size_bytes: int) -> InstallResult:
    """Copies a run to its end, stepping over pages that exist already."""
    outcome = copy(0)
    if outcome.done_bytes == run.count * page_size_bytes:
        return InstallResult([run])  # the common case
    result = InstallResult()
    done = 0
    for _ in range(min(run.count * 2, EXISTING_PAGES_MAX)):
        copied = outcome.done_bytes // page_size_bytes
        if copied:
            result.installed.append(PageRun(PageIndex(run.first + done), copied))
            done += copied
        if outcome.error == errno.EEXIST and not copied:
            _extend(result.existed, PageIndex(run.first + done))
            done += 1
        elif outcome.error not in (0, errno.EEXIST) and not (copied and outcome.error == errno.EAGAIN):
            _raise(outcome.error, run, result)
        if done == run.count:
            break
        outcome = copy(done)
    return result


def _extend(runs: list[PageRun], page: PageIndex) -> None:
    if runs and runs[-1].end == page:
        runs[-1] = PageRun(runs[-1].first, runs[-1].count + 1)
    else:
        runs.append(PageRun(page, 1))


def _raise(error: int, run: PageRun, partial: InstallResult) -> None:
    where = f"pages {run.first}+{run.count}"
    if error == errno.EAGAIN:
        raise DrainEvents(f"{where}: an event must be read first", partial)
    if error == errno.ESRCH:
        raise VmmGone(f"{where}: the VMM has exited", partial)
    if error in (errno.ENOSPC, errno.ENOMEM):
        raise NoSpace(f"{where}: no memory left on this host ({os.strerror(error)})", partial)
    raise InstallError(f"{where}: {os.strerror(error)} (errno {error})", partial)


_NO_LOCK = nullcontext()


class FileInstaller:
    """Writes pages into RAM files; a page is there when the file has data at its offset.

    Args:
        layout: guest memory.
        ram_fds: a descriptor for each region, open for writing.
        lock: held from the look whether a page is there until it is, where others install as well.
    """

    def __init__(
        self,
        layout: Layout,
        ram_fds: Sequence[int],
        lock: AbstractContextManager[None] = _NO_LOCK,
    ) -> None:
        self._layout = layout
        self._ram_fds = ram_fds
        self._lock = lock

    def install(self, run: PageRun, data: bytes | MappedBytes, data_offset: int) -> InstallResult:
        region = self._layout.region_of_page(run.first)
        result = InstallResult()
        for index in range(run.count):
            begin = data_offset + index * region.page_size_bytes
            self._write(PageIndex(run.first + index), region, data[begin : begin + region.page_size_bytes], result)
        return result

    def install_zero(self, run: PageRun) -> InstallResult:
        region = self._layout.region_of_page(run.first)
        result = InstallResult()
        for page in range(run.first, run.end):
            self._write(PageIndex(page), region, bytes(region.page_size_bytes), result)
        return result

    def wake(self, run: PageRun) -> None:
        """Nobody sleeps in the kernel on a simulated KVM."""

    def page_of_fault(self, address: int) -> PageIndex | None:
        return None

    def pages_of_range(self, start: int, end: int) -> list[PageRun]:
        return []

    def unregister(self) -> None:
        """Nothing is registered; holes read as zero anyway."""

    def _write(self, page: PageIndex, region: Region, data: bytes, result: InstallResult) -> None:
        descriptor = self._ram_fds[region.index]
        offset = (page - region.first_page) * region.page_size_bytes
        with self._lock:
            exists = _has_data(descriptor, offset)
            if not exists:
                os.pwrite(descriptor, data, offset)
        _extend(result.existed if exists else result.installed, page)


def _has_data(descriptor: int, offset: int) -> bool:
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) == offset
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise
