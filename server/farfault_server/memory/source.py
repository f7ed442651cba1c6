"""What the page server serves: regions, whether they may be read now, and which generation they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class PageRegion(Protocol):
    """One RAM block. Reading never changes it, holes included."""

    name: str
    backing: str
    size_bytes: int
    page_size_bytes: int

    def read(self, first_page: int, page_count: int) -> bytes:
        """Whole pages, ``page_count * page_size_bytes`` bytes.

        Raises:
            OSError: the memory cannot be read, or is shorter than it was.
        """

    def zero_pages_ahead(self, first_page: int, page_count: int) -> int:
        """How many pages from `first_page` on are known to be zero without reading them; at most `page_count`."""

    def identity(self) -> list[int]:
        """Numbers that stay the same while the memory does; compared after a restart of the server."""

    def close(self) -> None:
        """Gives descriptors back."""


@dataclass(slots=True)
class ServedMemory:
    """The memory of one VM as the lanes see it.

    Attributes:
        regions: in the order of their ids.
        readable: the VM does not run: pages may be served.
        generation: changes whenever the VM may have run.
    """

    regions: Sequence[PageRegion]
    readable: bool = False
    generation: int = 0
