"""The checksum of a `PageBatch`: XXH3-64 of its page data, seeded with a checksum of everything that places them.

The seed is XXH3-64 (seed 0) of 64-bit little-endian numbers: generation, how many requests are done, their ids, then
region, first page, page count and kind of each extent. So a flipped bit anywhere in a batch is noticed, and the data
are hashed where they lie.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeAlias

import xxhash

from farfault.v1 import pages_pb2 as pb

Buffer: TypeAlias = bytes | memoryview


@lru_cache(maxsize=64)
def _numbers(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


def placing_seed(done_request_ids: Sequence[int], extents: Iterable[tuple[int, int, int, int]], generation: int) -> int:
    """What the checksum of the data is seeded with; arguments as of `batch_checksum`."""
    numbers = [generation, len(done_request_ids), *done_request_ids]
    for extent in extents:
        numbers += extent
    return xxhash.xxh3_64_intdigest(_numbers(len(numbers)).pack(*numbers))


def batch_checksum(
    done_request_ids: Sequence[int],
    extents: Iterable[tuple[int, int, int, int]],
    generation: int,
    data: Sequence[Buffer],
) -> int:
    """The checksum of a batch.

    Args:
        done_request_ids: requests that are answered in full.
        extents: ``(region, first_page, page_count, kind)`` in order.
        generation: of the memory.
        data: the pages, in pieces.
    """
    seed = placing_seed(done_request_ids, extents, generation)
    if len(data) == 1:
        return xxhash.xxh3_64_intdigest(data[0], seed)
    hashed = xxhash.xxh3_64(seed=seed)
    for piece in data:
        hashed.update(piece)
    return hashed.intdigest()


def checksum_of(header: pb.PageBatch, data: Buffer) -> int:
    """The checksum that a batch with this header and these pages must have."""
    extents = [(extent.region, extent.first_page, extent.page_count, int(extent.kind)) for extent in header.extents]
    return batch_checksum(header.done_request_ids, extents, header.generation, (data,))
