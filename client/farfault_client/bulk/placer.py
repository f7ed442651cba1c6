"""Puts the pages of verified answers into guest memory, those of them that are in flight."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Final

from farfault.digest import pages_digest
from farfault_shim.attach.wire import HandOver
from farfault_shim.install.installer import (
    DrainEvents,
    FileInstaller,
    Installer,
    InstallError,
    InstallResult,
    UffdInstaller,
)
from farfault_shim.layout import Layout, PageIndex, PageRun, Region
from farfault_shim.uffd.userfaultfd import MappedBytes, Userfaultfd

from farfault_client.bulk.messages import Target
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.engine.page_map import runs_in
from farfault_client.engine.states import PageState
from farfault_client.session.answers import Placement

CHUNK_BYTES: Final = 256 << 10
"""Installed while the lock is held once, about 0.13 ms; one page is always allowed."""
DRAIN_ATTEMPTS_MAX: Final = 100_000
"""Times that a chunk is tried again because the receiver has yet to read an event: at least 5 s."""
DRAIN_PAUSE_S: Final = 50e-6
DIGEST_CHUNK_PAGES: Final = 4096
"""A placement with a digest does not reach over a multiple of this within its region (`receive.digest`)."""


class Placer:
    """One VM's memory, as the bulk process has it.

    Args:
        target: where it is; `descriptors` belong to it, in the order of the hand-over's names.
        shared: the receiver's page states.
    """

    def __init__(self, target: Target, descriptors: list[int], shared: SharedPages) -> None:
        handover = target.handover
        self._layout: Layout = handover.layout()
        self._shared = shared
        self._with_digest = target.with_digest
        self._descriptors = descriptors
        self._installer = _installer(handover, descriptors)

    def close(self) -> None:
        """Gives the descriptors back; the VMM and the receiver keep theirs."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def place(self, run: PageRun, data: bytes | MappedBytes, data_offset: int, placements: list[Placement]) -> None:
        """Installs the pages of a run, which lies in one region, that are in flight.

        Args:
            data, data_offset: the bytes of the whole run begin there.
            placements: gets what is in memory, also where an exception ends it.

        Raises:
            InstallError: the VMM is gone, or there is no memory left.
        """
        region = self._layout.region_of_page(run.first)
        chunk_pages = max(1, CHUNK_BYTES // region.page_size_bytes)
        drains = position = 0
        while position < run.count:
            count = min(chunk_pages, run.count - position)
            if self._with_digest:
                count = min(count, DIGEST_CHUNK_PAGES - (run.first + position - region.first_page) % DIGEST_CHUNK_PAGES)
            chunk = PageRun(PageIndex(run.first + position), count)
            done = self._place_chunk(chunk, data, data_offset + position * region.page_size_bytes, placements)
            position += done
            drains = 0 if done else drains + 1
            if drains > DRAIN_ATTEMPTS_MAX:
                raise RuntimeError(f"page {chunk.first}: the receiver reads no events of its userfaultfd")
            if done < count:
                time.sleep(DRAIN_PAUSE_S)  # without the lock: the receiver reads the event, and says what it removes

    def _place_chunk(
        self, chunk: PageRun, data: bytes | MappedBytes, data_offset: int, placements: list[Placement]
    ) -> int:
        """Returns how far it came: to the end, or to where an event must be read first."""
        region = self._layout.region_of_page(chunk.first)
        with self._shared.second:
            for part in runs_in(self._shared.states, chunk.first, chunk.count, PageState.IN_FLIGHT):
                offset = data_offset + (part.first - chunk.first) * region.page_size_bytes
                try:
                    result = self._installer.install(part, data, offset)
                except InstallError as error:
                    placements += self._placements(region, error.partial, part, data, offset)
                    if isinstance(error, DrainEvents):
                        return part.first + _page_count(error.partial) - chunk.first
                    raise
                placements += self._placements(region, result, part, data, offset)
        return chunk.count

    def _placements(
        self, region: Region, result: InstallResult, run: PageRun, data: bytes | MappedBytes, data_offset: int
    ) -> Iterator[Placement]:
        for part in result.existed:
            yield Placement(part, True, 0)
        for part in result.installed:
            digest = 0
            if self._with_digest:
                begin = data_offset + (part.first - run.first) * region.page_size_bytes
                pages = data[begin : begin + part.count * region.page_size_bytes]
                digest = pages_digest(pages, part.first - region.first_page, region.page_size_bytes)
            yield Placement(part, False, digest)


def _page_count(result: InstallResult) -> int:
    return sum(run.count for run in (*result.installed, *result.existed))


def _installer(handover: HandOver, descriptors: list[int]) -> Installer:
    named = dict(zip(handover.descriptors, descriptors, strict=True))
    if "uffd" not in named:
        return FileInstaller(handover.layout(), descriptors)
    alias = Userfaultfd(named["alias_uffd"]) if "alias_uffd" in named else None
    return UffdInstaller(handover.layout(), handover, Userfaultfd(named["uffd"]), alias)
