"""The flat row of pages."""

from __future__ import annotations

import pytest
from farfault_shim.layout import Layout, PageIndex, PageRun
from hypothesis import given
from hypothesis import strategies as st

KIB4, MIB2, GIB1 = 4 << 10, 2 << 20, 1 << 30

MIXED = Layout([(3 * KIB4, KIB4), (2 * MIB2, MIB2), (GIB1, GIB1), (KIB4, KIB4)])


def test_regions_lie_end_to_end() -> None:
    assert [region.index for region in MIXED.regions] == [0, 1, 2, 3]
    assert [region.first_page for region in MIXED.regions] == [0, 3, 5, 6]
    assert [region.end_page for region in MIXED.regions] == [3, 5, 6, 7]
    assert [region.offset_bytes for region in MIXED.regions] == [
        0,
        3 * KIB4,
        3 * KIB4 + 2 * MIB2,
        3 * KIB4 + 2 * MIB2 + GIB1,
    ]
    assert MIXED.page_count == 7
    assert MIXED.size_bytes == 4 * KIB4 + 2 * MIB2 + GIB1


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [(KIB4, 8192)],
        [(KIB4, 0)],
        [(0, KIB4)],
        [(-KIB4, KIB4)],
        [(KIB4 + 1, KIB4)],
        [(KIB4, MIB2)],
    ],
)
def test_a_layout_that_cannot_be_is_refused(sizes: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError):
        Layout(sizes)


@pytest.mark.parametrize("page", [-1, 7, 1 << 64])
def test_pages_outside_are_refused(page: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        MIXED.region_of_page(page)
    with pytest.raises(IndexError, match="outside"):
        MIXED.offset_of(page)


@pytest.mark.parametrize("offset", [-1, MIXED.size_bytes])
def test_offsets_outside_are_refused(offset: int) -> None:
    with pytest.raises(IndexError, match="outside"):
        MIXED.page_at(offset)


def test_split_cuts_at_every_border() -> None:
    parts = [(region.index, *run) for region, run in MIXED.split(1, 6)]
    assert parts == [(0, 1, 2), (1, 3, 2), (2, 5, 1), (3, 6, 1)]
    assert list(MIXED.split(4, 0)) == []
    with pytest.raises(IndexError):
        list(MIXED.split(6, 2))


def test_pages_of_bytes_across_a_border() -> None:
    assert MIXED.pages_of_bytes(3 * KIB4 - 1, 2) == PageRun(PageIndex(2), 2)
    assert MIXED.pages_of_bytes(0, MIXED.size_bytes) == PageRun(PageIndex(0), 7)
    with pytest.raises(ValueError):
        MIXED.pages_of_bytes(0, 0)
    with pytest.raises(IndexError):
        MIXED.pages_of_bytes(MIXED.size_bytes - 1, 2)


def test_equality_is_of_regions() -> None:
    assert Layout([(KIB4, KIB4)]) == Layout([(KIB4, KIB4)])
    assert hash(Layout([(KIB4, KIB4)])) == hash(Layout([(KIB4, KIB4)]))
    assert Layout([(MIB2, KIB4)]) != Layout([(MIB2, MIB2)])
    assert Layout([(KIB4, KIB4)]) != "a layout"
    assert repr(Layout([(KIB4, KIB4)])) == "Layout([(4096, 4096)])"


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    pages = draw(
        st.lists(st.tuples(st.integers(1, 5), st.sampled_from([KIB4, MIB2, GIB1])), min_size=1, max_size=5),
    )
    return Layout((count * size, size) for count, size in pages)


@given(layouts(), st.data())
def test_pages_and_offsets_are_inverse(layout: Layout, data: st.DataObject) -> None:
    page = data.draw(st.integers(0, layout.page_count - 1))
    region = layout.region_of_page(page)
    offset = layout.offset_of(page)
    within = data.draw(st.integers(0, region.page_size_bytes - 1))
    assert layout.page_at(offset + within) == page
    assert layout.region_at(offset + within) is region
    assert region.first_page <= page < region.end_page
    assert sum(run.count for _, run in layout.split(page, layout.page_count - page)) == layout.page_count - page
