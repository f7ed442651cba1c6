"""The zipf-like order: counts from steps, shares of visits, permutation."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from farfault_shim.guest import GuestKind, GuestParameters
from farfault_shim.guest.skew import Skew, skew_classes
from hypothesis import given
from hypothesis import strategies as st


def skew_of(pages: int, kind: GuestKind = GuestKind.ZIPF) -> Skew:
    skew = GuestParameters(low_bytes=pages * 4096, kind=kind).skew
    assert skew is not None
    return skew


def test_rounds_have_no_skew() -> None:
    assert GuestParameters(low_bytes=4096, kind=GuestKind.RANDOM).skew is None
    assert not GuestKind.SEQUENTIAL.is_skewed


@pytest.mark.parametrize(("pages", "classes"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (1 << 18, 19)])
def test_classes_end_with_the_pages(pages: int, classes: int) -> None:
    assert skew_classes(pages) == classes
    assert skew_of(pages).used_pages == pages


@given(pages=st.integers(1, 2000))
def test_every_page_has_one_rank(pages: int) -> None:
    skew = skew_of(pages)
    assert sorted(map(skew.page_of, range(pages))) == list(range(pages))


@given(pages=st.integers(1, 100), kind=st.sampled_from([GuestKind.ZIPF, GuestKind.IDLE]), data=st.data())
def test_visits_follow_from_the_steps_of_the_classes(pages: int, kind: GuestKind, data: st.DataObject) -> None:
    skew = skew_of(pages, kind)
    steps = [data.draw(st.integers(0, 300)) for _ in range(skew.classes)]
    made = Counter(skew.page_at(number, step) for number in range(skew.classes) for step in range(steps[number]))
    del made[None]
    assert skew.visits(steps) == [made[page] for page in range(pages)]
    for page in skew.upcoming(steps):
        assert 0 <= page < pages


def test_a_page_is_visited_about_once_where_the_first_is_as_often_as_its_rank() -> None:
    skew = skew_of(4095)
    visits = skew.visits([1 << 16] * skew.classes)
    for rank in (0, 1, 2, 7, 100, 4094):
        assert 1 <= visits[skew.page_of(rank)] * (rank + 1) / (1 << 16) < 2


def test_hot_pages_do_not_lie_together() -> None:
    hot = sorted(skew_of(1 << 16).page_of(rank) for rank in range(31))
    assert min(after - before for before, after in pairwise(hot)) > 1
    assert hot[-1] - hot[0] > 1 << 15
