"""Guest memory as a flat row of pages: the one address space that every part of the pager speaks.

Regions (RAM blocks) lie end to end in a *flat* byte space, as in a Firecracker snapshot file. Each has
its own page size. Pages are counted through all regions: a `PageIndex` names one page of one region.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, NewType

PageIndex = NewType("PageIndex", int)
"""Number of a page, counted through all regions of a `Layout`."""

FlatOffset = NewType("FlatOffset", int)
"""Byte position in the flat space of all regions."""

Gpa = NewType("Gpa", int)
"""Guest physical address."""

Hva = NewType("Hva", int)
"""Host virtual address in the VMM's process."""

PAGE_SIZES_BYTES = (4 << 10, 2 << 20, 1 << 30)


class PageRun(NamedTuple):
    """A run of consecutive pages of one region."""

    first: PageIndex
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here

    @property
    def end(self) -> int:
        """The index after the last page."""
        return self.first + self.count


@dataclass(frozen=True, slots=True)
class Region:
    """One RAM block.

    Attributes:
        index: position in `Layout.regions`; the region id on the wire.
        offset_bytes: of the first byte in the flat space.
        size_bytes: a multiple of `page_size_bytes`.
        page_size_bytes: 4 KiB, 2 MiB or 1 GiB.
        first_page: index of the first page.
    """

    index: int
    offset_bytes: FlatOffset
    size_bytes: int
    page_size_bytes: int
    first_page: PageIndex

    @property
    def page_count(self) -> int:
        return self.size_bytes // self.page_size_bytes

    @property
    def end_page(self) -> int:
        return self.first_page + self.page_count


class Layout:
    """The regions of one VM's memory, in order of their flat offsets, end to end.

    Args:
        sizes: ``(size_bytes, page_size_bytes)`` of each region.

    Raises:
        ValueError: no region, an unknown page size, or a size that is not a positive multiple of it.
    """

    def __init__(self, sizes: Iterable[tuple[int, int]]) -> None:
        regions: list[Region] = []
        offset, page = 0, 0
        for size_bytes, page_size_bytes in sizes:
            if page_size_bytes not in PAGE_SIZES_BYTES:
                raise ValueError(f"page size {page_size_bytes} is none of {PAGE_SIZES_BYTES}")
            if size_bytes <= 0 or size_bytes % page_size_bytes:
                raise ValueError(f"region size {size_bytes} is not a positive multiple of {page_size_bytes}")
            region = Region(len(regions), FlatOffset(offset), size_bytes, page_size_bytes, PageIndex(page))
            regions.append(region)
            offset += size_bytes
            page += region.page_count
        if not regions:
            raise ValueError("a layout needs at least one region")
        self.regions = tuple(regions)
        self.size_bytes = offset
        self.page_count = page
        self._offsets = [region.offset_bytes for region in regions]
        self._first_pages = [region.first_page for region in regions]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.regions == other.regions

    def __hash__(self) -> int:
        return hash(self.regions)

    def __repr__(self) -> str:
        return f"Layout({[(region.size_bytes, region.page_size_bytes) for region in self.regions]})"

    def region_of_page(self, page: int) -> Region:
        """The region that holds the page. Raises IndexError outside the layout."""
        if not 0 <= page < self.page_count:
            raise IndexError(f"page {page} is outside 0..{self.page_count - 1}")
        return self.regions[bisect_right(self._first_pages, page) - 1]

    def region_at(self, offset: int) -> Region:
        """The region that holds the byte at a flat offset. Raises IndexError outside the layout."""
        if not 0 <= offset < self.size_bytes:
            raise IndexError(f"offset {offset:#x} is outside 0..{self.size_bytes - 1:#x}")
        return self.regions[bisect_right(self._offsets, offset) - 1]

    def page_at(self, offset: int) -> PageIndex:
        """The page that holds the byte at a flat offset. Raises IndexError outside the layout."""
        region = self.region_at(offset)
        return PageIndex(region.first_page + (offset - region.offset_bytes) // region.page_size_bytes)

    def offset_of(self, page: int) -> FlatOffset:
        """The flat offset of a page's first byte. Raises IndexError outside the layout."""
        region = self.region_of_page(page)
        return FlatOffset(region.offset_bytes + (page - region.first_page) * region.page_size_bytes)

    def split(self, first: int, count: int) -> Iterator[tuple[Region, PageRun]]:
        """Cuts a run of pages at region borders. Raises IndexError where it leaves the layout."""
        while count > 0:
            region = self.region_of_page(first)
            taken = min(count, region.end_page - first)
            yield region, PageRun(PageIndex(first), taken)
            first += taken
            count -= taken

    def pages_of_bytes(self, offset: int, size_bytes: int) -> PageRun:
        """The pages that a byte range touches. Raises IndexError outside the layout, ValueError for size < 1."""
        if size_bytes < 1:
            raise ValueError(f"a byte range needs a positive size, not {size_bytes}")
        region = self.region_at(offset)
        page_size_bytes, last = region.page_size_bytes, offset + size_bytes - 1
        first = region.first_page + (offset - region.offset_bytes) // page_size_bytes
        if last < region.offset_bytes + region.size_bytes:
            end = region.first_page + (last - region.offset_bytes) // page_size_bytes + 1
        else:
            end = self.page_at(last) + 1
        return PageRun(PageIndex(first), end - first)
