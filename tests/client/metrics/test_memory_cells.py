from __future__ import annotations

import pytest
from farfault_client.engine import PageState
from farfault_client.engine.page_map import PageMap
from farfault_client.engine.states import PageInput
from farfault_client.metrics.memory_cells import STRETCH_PAGES, STRETCHES_PER_CELL, cell_counts, settled_shares


def test_small_cells_are_counted_exactly() -> None:
    pages = PageMap(1000)
    pages.apply(0, 137, PageInput.INSTALL)

    counts = list(cell_counts(pages, 7))

    assert sum(cell[PageState.INSTALLED] for cell in counts) == 137
    assert sum(sum(cell.values()) for cell in counts) == 1000


def test_there_are_never_more_cells_than_pages() -> None:
    assert len(list(cell_counts(PageMap(3), 100))) == 3


def test_large_cells_cost_the_same_and_keep_their_shares() -> None:
    pages = PageMap(1 << 20)
    pages.apply(0, 1 << 19, PageInput.INSTALL)

    first, second = cell_counts(pages, 2)

    assert first == {**dict.fromkeys(PageState, 0), PageState.INSTALLED: STRETCH_PAGES * STRETCHES_PER_CELL}
    assert second == {**dict.fromkeys(PageState, 0), PageState.ABSENT: STRETCH_PAGES * STRETCHES_PER_CELL}


@pytest.mark.parametrize("page_count", [4, 1000, 1 << 16])
def test_settled_shares_are_those_of_the_counts(page_count: int) -> None:
    pages = PageMap(page_count)
    pages.apply(0, page_count // 3, PageInput.INSTALL)
    pages.apply(page_count // 2, page_count // 4, PageInput.REMOVE)

    counts = cell_counts(pages, 7)

    assert list(settled_shares(pages, 7)) == [
        (cell[PageState.INSTALLED] + cell[PageState.REMOVED], sum(cell.values())) for cell in counts
    ]
