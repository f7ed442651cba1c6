"""Frames of the express lanes, as `LaneHello` in pages.proto describes them. No I/O."""

from __future__ import annotations

import struct
from typing import Final

from farfault.v1 import pages_pb2 as pb

from farfault_client.session.lease import PROTOCOL_VERSION, Lease

LENGTH: Final = struct.Struct("<I")
FRAME_SLACK_BYTES: Final = 64 << 10
"""A frame is longer than its pages by at most this much."""


def frame(message: bytes) -> bytes:
    """A message as it travels."""
    return LENGTH.pack(len(message)) + message


def hello(lease: Lease) -> bytes:
    """The first message of a client."""
    greeting = pb.LaneHello(protocol_version=PROTOCOL_VERSION, lease_id=lease.lease_id, token=lease.token)
    return greeting.SerializeToString()
