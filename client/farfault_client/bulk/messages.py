"""What the receiver and its bulk process say to each other: one message a packet of a SOCK_SEQPACKET pair.

::

    CONNECT  the receiver   JSON: target, tls folder, lease, sizes of regions; connect (again) and carry the lane
    REQUEST  the receiver   u64 generation, then a FetchRequest
    FREE     the receiver   u32 each of slots that were installed
    ANSWER   the bulk side  u32 slot, u32 where in it the data lie, u32 their bytes, u32 bytes on the wire, then a
                            PageBatch without data; the batch has been verified, checksum included
    LOST     the bulk side  u8 1: the server broke the contract, 0: connection gone; then a text
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from enum import IntEnum

MESSAGE_BYTES_MAX = 128 << 10
REQUEST_HEAD = struct.Struct("<Q")
ANSWER_HEAD = struct.Struct("<IIII")
SLOT = struct.Struct("<I")
NO_SLOT = 0xFFFF_FFFF


class MessageType(IntEnum):
    """First byte of a packet."""

    CONNECT = 1
    REQUEST = 2
    FREE = 3
    ANSWER = 4
    LOST = 5


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
