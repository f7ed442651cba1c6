"""Zero pages, found at C speed: no Python loop runs per page unless a page may be zero."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class PagesFound(NamedTuple):
    """A run of pages of one kind in a block."""

    first: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    is_zero: bool


@lru_cache(maxsize=8)
def zero_block(size_bytes: int) -> bytes:
    """So many zero bytes, made once."""
    return bytes(size_bytes)


def runs(block: bytes, page_size_bytes: int) -> Iterator[PagesFound]:
    """Splits a block of whole pages into runs of zero pages and runs of other pages, in order.

    Args:
        block: whole pages.
        page_size_bytes: divides ``len(block)``.
    """
    page_count = len(block) // page_size_bytes
    zero = zero_block(page_size_bytes)
    if block.startswith(zero) and block == zero_block(len(block)):  # a block to compare with is made only for this
        yield PagesFound(0, page_count, True)
        return
    flags = bytearray(page_count)
    for page in _maybe_zero(block, page_size_bytes, page_count):
        flags[page] = block[page * page_size_bytes : (page + 1) * page_size_bytes] == zero
    page = 0
    while page < page_count:
        zero_from = _next(flags, b"\x01", page, page_count)
        if zero_from > page:
            yield PagesFound(page, zero_from - page, False)
        page = _next(flags, b"\x00", zero_from, page_count)
        if page > zero_from:
            yield PagesFound(zero_from, page - zero_from, True)


def _next(flags: bytearray, flag: bytes, start: int, end: int) -> int:
    """The first page from `start` on with this flag, or `end`."""
    found = flags.find(flag, start)
    return end if found < 0 else found


def _maybe_zero(block: bytes, page_size_bytes: int, page_count: int) -> Iterator[int]:
    """Pages that are zero at three places; few others are."""
    probes = (0, page_size_bytes // 4 + 8, page_size_bytes // 2)
    mixed = 0
    for place in probes:
        mixed |= int.from_bytes(block[place::page_size_bytes], "little")
    candidates = mixed.to_bytes(page_count, "little")
    page = candidates.find(0)
    while page >= 0:
        yield page
        page = candidates.find(0, page + 1)
