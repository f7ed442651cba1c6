"""The digest of frozen memory that `PageService.Digest` answers with, for either side of a check."""

from __future__ import annotations

from typing import Final

import xxhash

DIGEST_MODULUS: Final = 1 << 64


def pages_digest(data: bytes | memoryview, first_page: int, page_size_bytes: int) -> int:
    """The sum, modulo 2**64, of XXH3-64(page, seed = page index in its region) over whole pages.

    Digests of parts of a range add up, modulo `DIGEST_MODULUS`, to the digest of the range.

    Args:
        data: the pages.
        first_page: index in its region of the first page in `data`.
        page_size_bytes: divides ``len(data)``.
    """
    hashed = xxhash.xxh3_64_intdigest
    starts = range(0, len(data), page_size_bytes)
    pages = (data[start : start + page_size_bytes] for start in starts)
    return sum(map(hashed, pages, range(first_page, first_page + len(starts)))) % DIGEST_MODULUS
