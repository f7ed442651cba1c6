"""The commonest exchange, a request for one page and the answer that brings it, without the generated classes.

Nearly every fault is this: one page is asked for, and it comes with data and alone. Both messages are then known but
for a few numbers, so they are made and read as bytes: the same bytes that the generated classes and `farfault.codec`
write, which tests make sure of. Whoever reads an answer knows what he asked for; an answer that is not to the byte what
`ExpectedPage` says is no error, but one for `farfault.codec`.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final, NamedTuple

import xxhash

from farfault.checksum import placing_seed
from farfault.codec import (
    CHECKSUM_TAG,
    DATA_TAG,
    DONE_TAG,
    EXTENT_TAG,
    QUEUE_TAG,
    READ_TAG,
    extent_body,
    generation_field,
    varint,
)
from farfault.v1 import pages_pb2 as pb

_DATA: Final = int(pb.EXTENT_KIND_DATA)
_CHECKSUM: Final = struct.Struct("<Q")
_PRIORITIES: Final = tuple(b"\x10" + varint(priority) + b"\x1a" for priority in range(16))
"""Of a request: its priority, and the tag of the range that follows."""
_TIMES_TAGS: Final = (QUEUE_TAG[0], READ_TAG[0])
_TIMES_BYTES_MAX: Final = 10
"""Two times in microseconds with their tags, each below 2^28: 268 s."""
_xxh3 = xxhash.xxh3_64_intdigest


@lru_cache(maxsize=2)
def _place(region: int, page: int) -> bytes:
    """Region, first page and a count of 1, as a PageRange and an Extent have them, with their length.

    Whoever sends a request wants it twice, for that and for what is then expected.
    """
    body = extent_body((region, page, 1, _DATA))
    return varint(len(body)) + body


def request_message(request_id: int, priority: int, region: int, page: int) -> bytes:
    """A `FetchRequest` for one page of a region, as it travels.

    Args:
        request_id: above 0.
        priority: a value of `pb.Priority` above 0.
    """
    return b"\x08" + varint(request_id) + _PRIORITIES[priority] + _place(region, page)


def _front(request_id: int, region: int, page: int) -> bytes:
    """How the answer begins, up to its checksum."""
    number = varint(request_id)
    return DONE_TAG + varint(len(number)) + number + EXTENT_TAG + _place(region, page)


def _seed(generation: int, request_id: int, region: int, page: int) -> int:
    """What the checksum of the data is seeded with (`farfault.checksum`)."""
    return placing_seed((request_id,), ((region, page, 1, _DATA),), generation)


def page_pieces(request_id: int, region: int, page: int, data: bytes, generation: int) -> list[bytes]:
    """A `PageBatch` that answers such a request, in pieces that make its bytes one after the other, up to its times
    (`farfault.codec.times_fields`)."""
    checksum = _xxh3(data, _seed(generation, request_id, region, page))
    front = _front(request_id, region, page)
    if checksum:
        front += CHECKSUM_TAG + _CHECKSUM.pack(checksum)
    return [front + DATA_TAG + varint(len(data)), data, generation_field(generation)]


class LonePage(NamedTuple):
    """A verified answer.

    Attributes:
        data: of the page.
        server_queue_us, server_read_us: the server's own measure of its two stages.
    """

    data: bytes
    server_queue_us: int
    server_read_us: int


class ExpectedPage:
    """How the answer to a request for one page will look, if it is the common one.

    Args:
        request_id, region, page: of the request.
        page_bytes: of a page of that region.
        generation: of the memory.
    """

    __slots__ = ("_data_at", "_end_at", "_head", "_seed", "_tags", "_tail")

    def __init__(self, request_id: int, region: int, page: int, page_bytes: int, generation: int) -> None:
        self._head = _front(request_id, region, page) + CHECKSUM_TAG
        self._seed = _seed(generation, request_id, region, page)
        self._tags = DATA_TAG + varint(page_bytes)
        self._data_at = len(self._head) + _CHECKSUM.size + len(self._tags)
        self._end_at = self._data_at + page_bytes
        self._tail = generation_field(generation)

    def read(self, message: bytes) -> LonePage | None:
        """The page of an answer; None: it is something else, or damaged."""
        head, data_at, end_at, tail = self._head, self._data_at, self._end_at, self._tail
        if not message.startswith(head) or not message.startswith(tail, end_at):
            return None
        if not message.startswith(self._tags, len(head) + _CHECKSUM.size):
            return None
        took_us = _read_times(message[end_at + len(tail) :])
        data = message[data_at:end_at]
        if took_us is None or _CHECKSUM.unpack_from(message, len(head))[0] != _xxh3(data, self._seed):
            return None
        return LonePage(data, *took_us)


def _read_times(rest: bytes) -> tuple[int, int] | None:
    """The two times at the end of an answer, each of which is left out where it is 0; None: something else is there."""
    if len(rest) == 2 and rest[0] == READ_TAG[0] and rest[1] < 0x80:
        return 0, rest[1]  # nothing waited, and the page was read in less than 128 us: nearly always
    if len(rest) > _TIMES_BYTES_MAX:
        return None
    took_us, position = [0, 0], 0
    for index, tag in enumerate(_TIMES_TAGS):
        if position == len(rest) or rest[position] != tag:
            continue
        position, shift = position + 1, 0
        while position < len(rest):
            byte = rest[position]
            position += 1
            took_us[index] |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        else:
            return None
    return (took_us[0], took_us[1]) if position == len(rest) else None
