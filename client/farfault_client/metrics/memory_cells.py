"""Guest memory as a row of cells, at a price that does not grow with the guest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from farfault_client.engine import PageState
from farfault_client.engine.page_map import PageMap

STRETCHES_PER_CELL: Final = 4
STRETCH_PAGES: Final = 256
"""A cell of more pages than these make together is judged by this many evenly spaced stretches."""


def cell_counts(pages: PageMap, cells: int) -> Iterator[dict[PageState, int]]:
    """Pages by state of each of `cells` equal parts of memory; fewer parts where there are fewer pages.

    The counts of a large cell are those of its stretches: their shares are right, not their sum.
    """
    cells = min(cells, pages.page_count)
    for cell in range(cells):
        first, end = cell * pages.page_count // cells, (cell + 1) * pages.page_count // cells
        if end - first <= STRETCHES_PER_CELL * STRETCH_PAGES:
            yield pages.counts(first, end)
            continue
        step = (end - first) // STRETCHES_PER_CELL
        total = dict.fromkeys(PageState, 0)
        for start in range(first, first + STRETCHES_PER_CELL * step, step):
            for state, count in pages.counts(start, start + STRETCH_PAGES).items():
                total[state] += count
        yield total
