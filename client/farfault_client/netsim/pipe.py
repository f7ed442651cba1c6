"""What a network does to one direction of one connection. No I/O, no clock.

`LinkModel.sent` says when a chunk arrives; the time it takes is half of the round trip, plus the time that the bytes
before it and its own take at the link's rate. All connections of a `LinkModel` share its rate in each direction.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

ON_THE_WAY_BYTES_MAX: Final = 64 << 20
"""In one direction of one connection where the link has no rate: 12 GB/s with a round trip of 10 ms."""
QUEUE_S: Final = 0.05
"""With a rate: what a router before the link holds beside what is on its way."""
QUEUE_BYTES_MIN: Final = 256 << 10


class Direction(Enum):
    """Which way bytes go, as the client sees it."""

    UP = "up"
    DOWN = "down"


@dataclass(slots=True)
class LinkModel:
    """A link of one rate and one round-trip time.

    Attributes:
        rtt_s: time of a round trip that the link adds.
        bytes_per_s: in each direction, over all connections; 0: no limit.
    """

    rtt_s: float = 0.0
    bytes_per_s: float = 0.0
    _busy_until: dict[Direction, float] = field(default_factory=lambda: dict.fromkeys(Direction, 0.0))

    @property
    def on_the_way_bytes_max(self) -> int:
        """Bound of the bytes in one direction of one connection; beyond it its sender is not read from."""
        if not self.bytes_per_s:
            return ON_THE_WAY_BYTES_MAX
        queue_bytes = max(QUEUE_BYTES_MIN, round(self.bytes_per_s * QUEUE_S))
        return min(ON_THE_WAY_BYTES_MAX, round(self.bytes_per_s * self.rtt_s / 2) + queue_bytes)

    def sent(self, direction: Direction, size_bytes: int, now: float) -> float:
        """When the last of `size_bytes` that were sent at `now` (seconds) arrives."""
        begin = max(now, self._busy_until[direction])
        if self.bytes_per_s:
            begin += size_bytes / self.bytes_per_s
        self._busy_until[direction] = begin
        return begin + self.rtt_s / 2


class Fault(Enum):
    """What can go wrong with bytes or connections."""

    RESET = "reset"
    """All connections end at once, by RST."""
    PARTITION = "partition"
    """Nothing passes in either direction, and nobody is told; new connections wait."""
    HALF_OPEN = "half-open"
    """Nothing passes on the connections that are there now, and nobody is told; new ones work."""
    CORRUPT = "corrupt"
    """One bit of a coming chunk towards the client is turned."""
    TRUNCATE = "truncate"
    """The end of a coming chunk towards the client is lost, then the connection ends."""
    DUPLICATE = "duplicate"
    """A coming chunk towards the client arrives twice."""
    STALL = "stall"
    """Everything is late by the fault's duration, once."""


def damaged(data: bytes, fault: Fault, rng: random.Random) -> bytes:
    """A chunk as it arrives under `CORRUPT`, `TRUNCATE` or `DUPLICATE`."""
    if fault is Fault.CORRUPT:
        bit = rng.randrange(len(data) * 8)
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)
    if fault is Fault.TRUNCATE:
        return data[: rng.randrange(len(data))]
    assert fault is Fault.DUPLICATE
    return data + data
