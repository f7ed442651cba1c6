"""The end-to-end check of `--verify`: what was installed against what the page server holds. No I/O.

Each page that comes with data is hashed with its own number as it is installed, and the hashes are summed, so their
order does not matter (see `farfault.digest`). At the end the pages that came as zeros join, and the sums are compared
with the page server's `Digest` of the same pages. The checksums of answers guard the way; this guards our own account
of which page is which: a page that was never fetched, fetched as another, or installed shifted changes a sum.

Left out are pages whose bytes nobody sent to us: those that the guest gave back, and those that were in memory before
this receiver started, which the guest may have changed since.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import xxhash
from farfault.digest import DIGEST_MODULUS, pages_digest
from farfault_shim.layout import Layout, PageIndex, PageRun, Region

from farfault_client.engine import PageState
from farfault_client.engine.page_map import PageMap

CHUNK_PAGES: Final = 4096
"""Pages whose sums are compared as one; a difference is known to lie in one chunk."""
_UNKNOWN, _SUMMED, _LEFT_OUT = range(3)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Pages of one region to compare.

    Attributes:
        region: theirs.
        runs: the pages that count, counted through all regions as everywhere.
        digest: their sum.
    """

    region: Region
    runs: Sequence[PageRun]
    digest: int

    @property
    def page_count(self) -> int:
        return sum(run.count for run in self.runs)

    def __str__(self) -> str:
        first, end = self.runs[0].first - self.region.first_page, self.runs[-1].end - self.region.first_page
        return f"pages {first:#x} to {end - 1:#x} of region {self.region.index}"


class RamDigest:
    """Sums of one VM's memory. A byte a page, and a number for each `CHUNK_PAGES`.

    Args:
        layout: guest memory.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._marks = bytearray(layout.page_count)
        self._sums = [[0] * -(-region.page_count // CHUNK_PAGES) for region in layout.regions]

    def installed(self, run: PageRun, data: bytes) -> None:
        """Pages of one region were installed with these bytes."""
        region = self._layout.region_of_page(run.first)
        size = region.page_size_bytes
        done = 0
        while done < run.count:
            first = run.first - region.first_page + done
            count = min(run.count - done, CHUNK_PAGES - first % CHUNK_PAGES)
            part = data[done * size : (done + count) * size]
            self.summed(PageRun(PageIndex(run.first + done), count), pages_digest(part, first, size))
            done += count

    def summed(self, run: PageRun, digest: int) -> None:
        """Pages of one chunk of `CHUNK_PAGES` were installed; `digest` is their sum."""
        region = self._layout.region_of_page(run.first)
        sums, chunk = self._sums[region.index], (run.first - region.first_page) // CHUNK_PAGES
        sums[chunk] = (sums[chunk] + digest) % DIGEST_MODULUS
        self._marks[run.first : run.end] = bytes([_SUMMED]) * run.count

    def leave_out(self, run: PageRun) -> None:
        """Nobody sends the bytes of these pages; what came of them before counts all the same."""
        unknown = self._marks[run.first : run.end]
        self._marks[run.first : run.end] = unknown.replace(bytes([_UNKNOWN]), bytes([_LEFT_OUT]))

    def chunks(self, pages: PageMap) -> Iterator[Chunk]:
        """What to compare once every page is settled: pages with data, and those that came as zeros.

        Args:
            pages: the engine's.
        """
        for region in self._layout.regions:
            zero_page = bytes(region.page_size_bytes)
            for number, summed in enumerate(self._sums[region.index]):
                first = region.first_page + number * CHUNK_PAGES
                count = min(CHUNK_PAGES, region.end_page - first)
                zeros = self._zeros(pages, PageIndex(first), count)
                digest = summed + sum(xxhash.xxh3_64_intdigest(zero_page, page - region.first_page) for page in zeros)
                runs = self._counted(first, count, zeros)
                if runs:
                    yield Chunk(region, runs, digest % DIGEST_MODULUS)

    def _zeros(self, pages: PageMap, first: PageIndex, count: int) -> set[int]:
        """Pages that the source called zero: installed where somebody waited for them, else left as holes."""
        settled = pages.runs(first, count, PageState.INSTALLED, PageState.REMOVED)
        return {page for run in settled for page in range(run.first, run.end) if self._marks[page] == _UNKNOWN}

    def _counted(self, first: int, count: int, zeros: set[int]) -> list[PageRun]:
        runs: list[PageRun] = []
        for page in range(first, first + count):
            if self._marks[page] != _SUMMED and page not in zeros:
                continue
            if runs and runs[-1].end == page:
                runs[-1] = PageRun(runs[-1].first, runs[-1].count + 1)
            else:
                runs.append(PageRun(PageIndex(page), 1))
        return runs
