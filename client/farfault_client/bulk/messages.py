"""What the receiver and its bulk process say to each other: one message a packet of a SOCK_SEQPACKET pair.

::

    TARGET   the receiver   JSON, and descriptors: the memory that pages go into from now on; no JSON: none
    CONNECT  the receiver   JSON: target, tls folder, lease, sizes of regions; connect (again) and carry the lane
    REQUEST  the receiver   u64 generation, then a FetchRequest
    PLACED   the bulk side  what a verified answer brought and what became of it (`pack_placed`)
    LOST     the bulk side  u8 1: the server broke the contract, 0: connection gone; then a text
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Final

from farfault_shim.attach.wire import HandOver
from farfault_shim.layout import PageIndex, PageRun

from farfault_client.session.answers import Placed, Placement, sort_extents

MESSAGE_BYTES_MAX: Final = 160 << 10
DESCRIPTORS_MAX: Final = 64
"""That travel with one message: one for each region of memory, or two userfaultfds."""
REQUEST_HEAD: Final = struct.Struct("<Q")
PLACEMENTS_PER_PACKET_MAX: Final = 1024

_PLACED_HEAD: Final = struct.Struct("<IIIIHHH")
"""Bytes on the wire, µs in the server's queue, µs of its reading, pages left out; then how many of what follows."""
_DONE: Final = struct.Struct("<Q")
_PLACEMENT: Final = struct.Struct("<QIIQ")
"""First page, pages, 1: they were there already, digest."""
_EXTENT: Final = struct.Struct("<QII")
"""First page, pages, kind: of those without data."""


class MessageType(IntEnum):
    """First byte of a packet."""

    TARGET = 1
    CONNECT = 2
    REQUEST = 3
    PLACED = 4
    LOST = 5
    CONNECTED = 6


@dataclass(frozen=True, slots=True)
class Target:
    """The memory that pages go into. Its descriptors travel beside it, in the order of the hand-over's names.

    Attributes:
        handover: its ``descriptors`` are those that travel: ``uffd`` and perhaps ``alias_uffd``, or ``ram0`` ...
        with_digest: sum what is installed.
    """

    handover: HandOver
    with_digest: bool

    def pack(self) -> bytes:
        return bytes([MessageType.TARGET, self.with_digest]) + self.handover.pack()

    @classmethod
    def unpack(cls, payload: bytes) -> Target | None:
        return cls(HandOver.parse(payload[1:]), bool(payload[0])) if payload else None


@dataclass(frozen=True, slots=True)
class Connect:
    """Where to, and for whom.

    Attributes:
        target: the page server's address for this lane.
        is_express: frames on a plain stream; otherwise gRPC.
        regions: ``(size_bytes, page_size_bytes)`` of each.
        streams: over gRPC.
    """

    target: str
    is_express: bool
    tls: str
    lease_id: str
    token: str
    generation: int
    regions: list[tuple[int, int]]
    streams: int

    def pack(self) -> bytes:
        return bytes([MessageType.CONNECT]) + json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Connect:
        fields = json.loads(payload)
        fields["regions"] = [(int(size), int(page)) for size, page in fields["regions"]]
        return cls(**fields)


def pack_placed(
    wire_bytes: int,
    server_us: tuple[int, int],
    clipped_pages: int,
    done: Sequence[int],
    placements: Sequence[Placement],
    extents: Sequence[tuple[PageRun, int]],
) -> Iterator[bytes]:
    """The packets that tell what became of an answer; the last one names the requests that are done.

    Args:
        wire_bytes: of the answer.
        server_us: its `server_queue_us` and `server_read_us`.
        clipped_pages: pages with data that were left out.
        done: request ids.
        placements: what is in memory.
        extents: runs without data, with their kind on the wire.
    """
    while len(placements) > PLACEMENTS_PER_PACKET_MAX:
        yield _pack((0, 0, 0, 0), (), placements[:PLACEMENTS_PER_PACKET_MAX], ())
        placements = placements[PLACEMENTS_PER_PACKET_MAX:]
    yield _pack((wire_bytes, *server_us, clipped_pages), done, placements, extents)


def _pack(
    head: tuple[int, int, int, int],
    done: Sequence[int],
    placements: Sequence[Placement],
    extents: Sequence[tuple[PageRun, int]],
) -> bytes:
    pieces = [bytes([MessageType.PLACED]), _PLACED_HEAD.pack(*head, len(done), len(placements), len(extents))]
    pieces += map(_DONE.pack, done)
    pieces += [_PLACEMENT.pack(*run, existed, digest) for run, existed, digest in placements]
    pieces += [_EXTENT.pack(*run, kind) for run, kind in extents]
    return b"".join(pieces)


def unpack_placed(packet: bytes) -> tuple[int, Placed]:
    """Bytes on the wire, and what became of an answer."""
    wire_bytes, queue_us, read_us, clipped, n_done, n_placements, n_extents = _PLACED_HEAD.unpack_from(packet, 1)
    position = 1 + _PLACED_HEAD.size
    done = tuple(number for (number,) in _DONE.iter_unpack(packet[position : position + n_done * _DONE.size]))
    position += n_done * _DONE.size
    end = position + n_placements * _PLACEMENT.size
    placements = [
        Placement(PageRun(PageIndex(first), count), bool(existed), digest)
        for first, count, existed, digest in _PLACEMENT.iter_unpack(packet[position:end])
    ]
    extents, refusals = sort_extents(
        (PageRun(PageIndex(first), count), kind) for first, count, kind in _EXTENT.iter_unpack(packet[end:])
    )
    assert len(extents) == n_extents
    return wire_bytes, Placed(placements, extents, done, refusals, clipped, queue_us, read_us)
