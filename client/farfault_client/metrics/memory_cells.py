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
    for stretches in _cells(pages.page_count, cells):
        total = dict.fromkeys(PageState, 0)
        for first, end in stretches:
            for state, count in pages.counts(first, end).items():
                total[state] += count
        yield total


def settled_shares(pages: PageMap, cells: int) -> Iterator[tuple[int, int]]:
    """Settled pages and all pages of each cell, as `cell_counts` has them, at a tenth of the price: a receiver asks
    while threads wait."""
    for stretches in _cells(pages.page_count, cells):
        yield sum(pages.settled_within(*stretch) for stretch in stretches), sum(end - first for first, end in stretches)


def _cells(page_count: int, cells: int) -> Iterator[list[tuple[int, int]]]:
    """Where to look for each cell: ``(first, end)``."""
    cells = min(cells, page_count)
    for cell in range(cells):
        first, end = cell * page_count // cells, (cell + 1) * page_count // cells
        if end - first <= STRETCHES_PER_CELL * STRETCH_PAGES:
            yield [(first, end)]
            continue
        step = (end - first) // STRETCHES_PER_CELL
        starts = range(first, first + STRETCHES_PER_CELL * step, step)
        yield [(start, start + STRETCH_PAGES) for start in starts]
