"""Compares pages with what their seed says they must be."""

from __future__ import annotations

from farfault.synthetic import synthetic_page
from farfault_shim.layout import Layout, PageRun

PROBLEMS_MAX = 10
"""Wrong pages that are described; the others are only counted."""


class SeedVerifier:
    """Checks every byte of synthetic memory.

    Args:
        seed: of the page server's memory.
        layout: of it.

    Attributes:
        wrong: pages that differ.
        verified: pages that were compared.
        problems: the first wrong pages, in words.
    """

    def __init__(self, seed: int, layout: Layout) -> None:
        self._seed = seed
        self._layout = layout
        self.wrong = 0
        self.verified = 0
        self.problems: list[str] = []

    def check(self, run: PageRun, data: bytes | None, offset: int = 0) -> None:
        """Compares a run of pages of one region.

        Args:
            run: pages, counted through all regions.
            data: holds them from `offset` on; None: they came as zero.
        """
        region = self._layout.region_of_page(run.first)
        size = region.page_size_bytes
        first = run.first - region.first_page
        for page in range(first, first + run.count):
            expected = synthetic_page(self._seed, region.index, page, size)
            if data is None:
                right = not any(expected[:64]) and expected == bytes(size)
            else:
                right = data[offset : offset + size] == expected
            if not right:
                self._describe(region.index, page, expected, data[offset : offset + size] if data else bytes(size))
            offset += size
        self.verified += run.count

    def _describe(self, region: int, page: int, expected: bytes, got: bytes) -> None:
        self.wrong += 1
        if len(self.problems) < PROBLEMS_MAX:
            at = next(position for position, byte in enumerate(expected) if byte != got[position])
            self.problems.append(
                f"page {page} of region {region} differs from byte {at} on: "
                f"{got[at : at + 8].hex()} instead of {expected[at : at + 8].hex()}"
            )
