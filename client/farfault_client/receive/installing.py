"""Carries out what the fault engine orders: pages go into memory, and engine, digest and waiting threads learn of it.

The kernel may want events of the userfaultfd read in between; what they remove is left out of the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from farfault_shim.install.installer import DrainEvents, Installer, InstallError, InstallResult
from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine import FaultEngine, Install, Waiter
from farfault_client.receive.digest import RamDigest

DRAIN_ATTEMPTS_MAX: Final = 100_000
"""Times that one install is tried again after a userfaultfd event had to be read first: at least 5 s."""
DRAIN_PAUSE_S: Final = 50e-6
"""Between two tries: the kernel refuses until the thread whose event was read has run again (mmap_changing)."""


class Installing:
    """One VM's memory, as the engine's orders reach it.

    Args:
        layout: guest memory.
        engine: told of what is installed, and of what could not be.
        installer: puts pages there.
        digest: sums what is installed; None: nobody asked for it.
        read_events: takes events off the userfaultfd, and tells the engine what they remove.
        wake: restarts threads.
    """

    def __init__(
        self,
        layout: Layout,
        engine: FaultEngine,
        installer: Installer,
        digest: RamDigest | None,
        read_events: Callable[[], None],
        wake: Callable[[list[Waiter]], None],
    ) -> None:
        self._layout = layout
        self._engine = engine
        self._installer = installer
        self._digest = digest
        self._read_events = read_events
        self._wake = wake

    def install(self, order: Install, data: bytes, base: int = 0) -> None:
        """Puts pages into memory that the engine ordered.

        Args:
            order: its pages' bytes begin `base` + ``order.data_offset`` into `data`.

        Raises:
            InstallError: the VMM is gone, or there is no memory left.
        """
        run, idle = order.run, 0
        while run.count and (parts := self._engine.to_install(run)):
            part = parts[0]
            offset = order.data_offset
            if offset >= 0:
                offset += base + (part.first - order.run.first) * self._page_bytes(part)
            done = self._try(part, data, offset)
            idle = 0 if done else idle + 1
            if idle > DRAIN_ATTEMPTS_MAX:
                raise _always_events(part.first)
            run = PageRun(PageIndex(part.first + done), run.end - part.first - done)

    def install_zero(self, page: PageIndex) -> None:
        """A thread waits for a page that was removed: it finds zeros. Raises as `install`."""
        for _ in range(DRAIN_ATTEMPTS_MAX):
            if self._try(PageRun(page, 1), b"", -1):
                return
        raise _always_events(page)

    def _try(self, run: PageRun, data: bytes, data_offset: int) -> int:
        """Installs a run as far as it goes at once; zero pages where `data_offset` is negative. Returns pages done."""
        zero = data_offset < 0
        try:
            result = self._installer.install_zero(run) if zero else self._installer.install(run, data, data_offset)
        except DrainEvents as drain:
            # What is in place came before the events, so it is told before them.
            self._sum(drain.partial, run, data, data_offset)
            done = self._tell(drain.partial, zero=zero)
            self._read_events()
            time.sleep(DRAIN_PAUSE_S)
            return done
        except InstallError as error:
            self._sum(error.partial, run, data, data_offset)
            self._tell(error.partial, zero=zero)
            self._engine.not_installed(run)
            raise
        self._sum(result, run, data, data_offset)
        return self._tell(result, zero=zero)

    def _sum(self, result: InstallResult, run: PageRun, data: bytes, data_offset: int) -> None:
        """Adds what was installed of a run to the digest, if there is one."""
        if self._digest is None:
            return
        for part in result.existed:
            self._digest.leave_out(part)
        if data_offset < 0:
            return
        page_size = self._page_bytes(run)
        for part in result.installed:
            begin = data_offset + (part.first - run.first) * page_size
            self._digest.installed(part, data[begin : begin + part.count * page_size])

    def _tell(self, result: InstallResult, *, zero: bool) -> int:
        done = 0
        for run in result.installed:
            done += run.count
            self._wake(self._engine.installed(run, zero=zero))
        for run in result.existed:
            done += run.count
            self._wake(self._engine.installed(run, existed=True))
        return done

    def _page_bytes(self, run: PageRun) -> int:
        return self._layout.region_of_page(run.first).page_size_bytes


def _always_events(page: PageIndex) -> RuntimeError:
    return RuntimeError(f"page {page}: userfaultfd asked to drain events {DRAIN_ATTEMPTS_MAX} times")
