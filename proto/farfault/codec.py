"""A hand-packed `PageBatch`: the bytes that the generated class writes, without copying pages more than once.

The generated class copies the page data into the message and once more into the wire bytes; reading copies it twice
too. Here `encode_batch` joins a short header and the pages in one copy, `encode_pieces` in none, and `decode_batch`
leaves the pages where they are. Field numbers and wire types are those of pages.proto; tests hold both against the
generated class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, TypeAlias

from google.protobuf.message import DecodeError

from farfault.v1 import pages_pb2 as pb

Extent: TypeAlias = tuple[int, int, int, int]
"""``(region, first_page, page_count, kind)``; kind is a value of `pb.ExtentKind`."""

DATA_TAG: Final = b"\x22"  # field 4, length-delimited
CHECKSUM_TAG: Final = b"\x19"  # field 3, 64-bit
EXTENT_TAG: Final = b"\x12"  # field 2, length-delimited
DONE_TAG: Final = b"\x0a"  # field 1, length-delimited: packed varints
_GENERATION_TAG: Final = b"\x28"  # field 5, varint
QUEUE_TAG: Final = b"\x30"  # field 6, varint
READ_TAG: Final = b"\x38"  # field 7, varint

VARINT_BYTES_MAX: Final = 10
SMALL_BATCH_BYTES: Final = 32 << 10
"""Up to this size a copy by the generated class is cheaper than finding the data from Python."""


def _varint_slow(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SHORT: Final = tuple(_varint_slow(value) for value in range(1 << 14))
_varint_cached = lru_cache(maxsize=1024)(_varint_slow)


def varint(value: int) -> bytes:
    """The base-128 form of a number in [0, 2**64)."""
    if value < 1 << 14:
        return _SHORT[value]
    if value < 1 << 21:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    return _varint_cached(value)


class DecodedBatch(NamedTuple):
    """A `PageBatch` whose pages were not copied.

    Attributes:
        header: the message; read every field but `data` from it.
        buffer: holds the page data; for a large batch these are the wire bytes themselves.
        data_offset, data_length: where the page data lies in `buffer`.
    """

    header: pb.PageBatch
    buffer: bytes | memoryview
    data_offset: int
    data_length: int

    @property
    def data(self) -> bytes | memoryview:
        """The page data: `buffer` itself where that holds nothing else, or a view of it."""
        if self.data_length == len(self.buffer):
            return self.buffer
        return memoryview(self.buffer)[self.data_offset : self.data_offset + self.data_length]


def encode_batch(
    done_request_ids: Iterable[int],
    extents: Iterable[Extent],
    checksum: int,
    data: bytes | Sequence[bytes],
    generation: int,
    *,
    server_queue_us: int = 0,
    server_read_us: int = 0,
) -> bytes:
    """The wire bytes of a `PageBatch`, the same that the generated class writes; arguments as of `encode_pieces`.

    Pages are copied once.
    """
    pieces = encode_pieces(
        done_request_ids,
        extents,
        checksum,
        (data,) if isinstance(data, bytes) else data,
        generation,
        server_queue_us=server_queue_us,
        server_read_us=server_read_us,
    )
    return b"".join(pieces)


def encode_pieces(
    done_request_ids: Iterable[int],
    extents: Iterable[Extent],
    checksum: int,
    data: Sequence[bytes],
    generation: int,
    *,
    server_queue_us: int = 0,
    server_read_us: int = 0,
) -> list[bytes]:
    """A `PageBatch` in pieces that make its wire bytes one after the other: pages are not copied at all.

    Args:
        done_request_ids: requests that are answered in full, each in [0, 2**64).
        extents: runs of pages.
        checksum: see `farfault.checksum`.
        data: the pages, in one piece or in several.
        generation: of the memory.
        server_queue_us: time in the queue.
        server_read_us: time to read.
    """
    head = bytearray()
    done = b"".join([varint(request_id) for request_id in done_request_ids])
    if done:
        head += DONE_TAG + varint(len(done)) + done
    for extent in extents:
        body = extent_body(extent)
        head += EXTENT_TAG + _SHORT[len(body)] + body
    if checksum:
        head += CHECKSUM_TAG + checksum.to_bytes(8, "little")
    tail = generation_field(generation) + times_fields(server_queue_us, server_read_us)
    size_bytes = sum(map(len, data))
    if size_bytes:
        head += DATA_TAG + varint(size_bytes)
    return [bytes(head), *data, tail]


def generation_field(generation: int) -> bytes:
    """What follows the data of a `PageBatch`; 0 is left out."""
    return _GENERATION_TAG + varint(generation) if generation else b""


def times_fields(server_queue_us: int, server_read_us: int) -> bytes:
    """The end of a `PageBatch`; a time of 0 is left out."""
    fields = QUEUE_TAG + varint(server_queue_us) if server_queue_us else b""
    return fields + READ_TAG + varint(server_read_us) if server_read_us else fields


def extent_body(extent: Extent) -> bytes:
    """An `Extent`, without its tag and length."""
    region, first_page, page_count, kind = extent
    body = b"\x08" + varint(region) if region else b""
    if first_page:
        body += b"\x10" + varint(first_page)
    if page_count:
        body += b"\x18" + varint(page_count)
    if kind:
        body += b"\x20" + varint(kind)
    return body


def decode_batch(raw: bytes) -> DecodedBatch:
    """Reads a `PageBatch`; the page data of a large one stays where it is in `raw`.

    Raises:
        DecodeError: the bytes are no PageBatch (google.protobuf.message.DecodeError).
    """
    if len(raw) <= SMALL_BATCH_BYTES:
        small = pb.PageBatch.FromString(raw)
        return DecodedBatch(small, small.data, 0, len(small.data))
    return _decode_large(raw)


def decode_view(view: memoryview) -> DecodedBatch:
    """Reads a `PageBatch` that lies in somebody's buffer: its pages stay there, whatever its size.

    The result's `buffer` is `view` itself.

    Raises:
        DecodeError: the bytes are no PageBatch.
    """
    return _decode_large(view)


def _decode_large(raw: bytes | memoryview) -> DecodedBatch:
    position, end = 0, len(raw)
    kept_from, data_offset, data_length = 0, end, 0
    kept: list[bytes | memoryview] = []
    while position < end:
        if raw[position] != DATA_TAG[0]:
            position = _skip_field(raw, position)
            continue
        data_length, data_offset = _read_varint(raw, position + 1)
        kept.append(raw[kept_from:position])
        position = kept_from = data_offset + data_length
    if position > end:
        raise DecodeError("a field is cut short")
    kept.append(raw[kept_from:])
    return DecodedBatch(pb.PageBatch.FromString(b"".join(kept)), raw, data_offset, data_length)


def _skip_field(raw: bytes | memoryview, position: int) -> int:
    """The position after the field that starts at `position`."""
    tag, position = _read_varint(raw, position)
    wire_type = tag & 7
    if wire_type == 2:
        length, position = _read_varint(raw, position)
        return position + length
    if wire_type == 0:
        return _read_varint(raw, position)[1]
    if wire_type == 1:
        return position + 8
    if wire_type == 5:
        return position + 4
    raise DecodeError(f"wire type {wire_type}")


def _read_varint(raw: bytes | memoryview, position: int) -> tuple[int, int]:
    """``(value, position after it)``."""
    value = shift = 0
    try:
        for _ in range(VARINT_BYTES_MAX):
            byte = raw[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
    except IndexError:
        raise DecodeError("a field is cut short") from None
    raise DecodeError("a number is longer than 10 bytes")
