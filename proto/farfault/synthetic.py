"""Synthetic memory: pages made from a seed, the same on both sides, so that any amount of memory needs no RAM.

A page is zero or a slice of a block of random bytes that starts with region and page number; so a page that was
delivered for another, or shifted, is told apart from the right one.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Final

ZERO_SHARE: Final = 8
"""One page of this many is zero, on average."""

_HEAD: Final = struct.Struct("<QII")
_MIX: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: consecutive numbers spread over the whole range
_MASK: Final = (1 << 64) - 1


@lru_cache(maxsize=16)
def _block(seed: int, page_size_bytes: int) -> bytes:
    """Random bytes, two pages long: a page is cut out at a place that depends on its number."""
    return hashlib.shake_256(b"farfault synthetic memory %d" % seed).digest(2 * page_size_bytes)


@lru_cache(maxsize=4)
def _zero(page_size_bytes: int) -> bytes:
    return bytes(page_size_bytes)


def synthetic_page(seed: int, region: int, page: int, page_size_bytes: int) -> bytes:
    """The bytes of one page; all zero for one page in `ZERO_SHARE`.

    Args:
        seed: any integer.
        region: index of the region, in [0, 2**32).
        page: index of the page in the region, in [0, 2**32).
        page_size_bytes: at least 16.
    """
    mixed = ((page << 8 ^ region ^ seed) * _MIX & _MASK) >> 32
    if mixed % ZERO_SHARE == 0:
        return _zero(page_size_bytes)
    start = (mixed >> 3) % page_size_bytes
    block = _block(seed, page_size_bytes)
    return _HEAD.pack(page, region, mixed) + block[start : start + page_size_bytes - _HEAD.size]
