"""Zero pages are found, all of them, and no others."""

from itertools import pairwise

import pytest
from farfault_server.memory.zeros import PagesFound, runs
from hypothesis import given
from hypothesis import strategies as st

SMALL_PAGE = 64


def split(block: bytes, page_size_bytes: int) -> list[bool]:
    """The plain way: one comparison a page."""
    starts = range(0, len(block), page_size_bytes)
    return [not any(block[start : start + page_size_bytes]) for start in starts]


@given(st.lists(st.one_of(st.none(), st.integers(0, SMALL_PAGE - 1)), max_size=40))
def test_like_one_comparison_a_page(places):
    """Each page is zero or has a single byte that is not, somewhere."""
    pages = []
    for place in places:
        page = bytearray(SMALL_PAGE)
        if place is not None:
            page[place] = 0xFF
        pages.append(bytes(page))
    block = b"".join(pages)
    found = list(runs(block, SMALL_PAGE))
    assert [run.is_zero for run in found for _ in range(run.count)] == split(block, SMALL_PAGE)
    assert [run.first for run in found] == [sum(run.count for run in found[:n]) for n in range(len(found))]
    assert all(run.count > 0 for run in found)
    assert all(before.is_zero != after.is_zero for before, after in pairwise(found))


@pytest.mark.parametrize("page_size_bytes", [4096, 2 << 20])
def test_whole_pages(page_size_bytes):
    zero, other = bytes(page_size_bytes), bytes(page_size_bytes - 1) + b"x"
    assert list(runs(zero * 2 + other + zero, page_size_bytes)) == [
        PagesFound(0, 2, True),
        PagesFound(2, 1, False),
        PagesFound(3, 1, True),
    ]


def test_nothing():
    assert list(runs(b"", 4096)) == []
