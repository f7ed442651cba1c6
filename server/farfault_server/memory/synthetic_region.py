"""Memory that is made from a seed when it is read: any size, no RAM."""

from __future__ import annotations

from farfault.synthetic import synthetic_page

PAGE_SIZE_BYTES = 4096


class SyntheticRegion:
    """A region of `farfault.synthetic` pages.

    Args:
        seed: of the pages.
        index: of the region.
        size_bytes: a multiple of 4096.
    """

    name = "synthetic"
    backing = "synthetic"
    page_size_bytes = PAGE_SIZE_BYTES

    def __init__(self, seed: int, index: int, size_bytes: int) -> None:
        self.seed = seed
        self.index = index
        self.size_bytes = size_bytes

    def read(self, first_page: int, page_count: int) -> bytes:
        pages = range(first_page, first_page + page_count)
        return b"".join([synthetic_page(self.seed, self.index, page, PAGE_SIZE_BYTES) for page in pages])

    def zero_pages_ahead(self, first_page: int, page_count: int) -> int:
        return 0

    def identity(self) -> list[int]:
        """Seed and size."""
        return [self.seed, self.size_bytes]

    def close(self) -> None:
        """Nothing is held."""
