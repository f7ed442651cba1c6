"""How many background bytes may be in flight: as many as the way holds, and few of them before a fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from farfault_client.engine.way import Departure, Way

BATCH_S: Final = 0.0012
"""A batch is as large as the way carries in this time, from `BATCH_BYTES_MIN` to what the engine allows."""
BATCH_BYTES_MIN: Final = 64 << 10
BATCHES_AHEAD: Final = 2
"""Batches in flight beside what the way holds: the server reads one and we install one, and the window can grow."""
CRUISE_GAIN: Final = 1.25
"""Of what the way holds: round trips vary, and a window without room for that sees its own gaps as a slower way."""
QUIET_S: Final = 0.05
"""After so long without a fault a queue on the way harms nobody yet."""
QUIET_GAIN: Final = 1.5
STARTUP_GAIN: Final = 2.0
"""Until the way is seen full the window doubles in each round trip."""
DRAIN_GAIN: Final = 0.25
DATA_QUEUE_S: Final = 0.05
"""Zero pages let the window grow beyond what the way holds of data; when data follow they queue up for so long."""
UNKNOWN_BYTES_MAX: Final = 4 << 20
"""The window until the first data have come."""


@dataclass
class BackgroundWindow:
    """The credit of the background lane. Times are in seconds.

    Attributes:
        floor_bytes: never less than this.
        ceiling_bytes: never more than this; fills 20 Gbit/s at 25 ms.
        batch_bytes_max: of one request.
        size_bytes: may be in flight now.
        batch_bytes: of the next request.
    """

    floor_bytes: int = 512 << 10
    ceiling_bytes: int = 64 << 20
    batch_bytes_max: int = 1 << 20

    def __post_init__(self) -> None:
        self._last_fault_at = float("-inf")
        self.lost()

    def allows(self, in_flight_bytes: int) -> bool:
        """True if another batch may be sent."""
        return in_flight_bytes < self.size_bytes

    def sent(self, in_flight_bytes: int, now: float) -> Departure:
        """A background batch was sent, while so much was in flight already. `arrived` wants what this returns."""
        return self._way.departed(in_flight_bytes, now)

    def fault(self, now: float) -> None:
        """A demand fault came."""
        was_quiet = now - self._last_fault_at > QUIET_S
        self._last_fault_at = now
        if was_quiet:
            self._resize(now)

    def arrived(self, size_bytes: int, data_bytes: int, now: float, departure: Departure) -> None:
        """Background bytes arrived, so many of them with data; the rest are zero."""
        self._way.arrived(size_bytes, data_bytes, now, departure)
        self._resize(now)

    def lost(self) -> None:
        """The connection was lost; the next one may go another way."""
        self._way = Way()
        self.size_bytes = self.floor_bytes
        self.batch_bytes = min(self.floor_bytes, self.batch_bytes_max)

    def _resize(self, now: float) -> None:
        way = self._way
        holds_bytes = way.holds_bytes
        if not holds_bytes:
            return
        self.batch_bytes = int(min(max(BATCH_BYTES_MIN, way.bytes_per_s * BATCH_S), self.batch_bytes_max))
        ahead_bytes = BATCHES_AHEAD * self.batch_bytes
        if way.is_draining:
            wanted = holds_bytes * DRAIN_GAIN
        elif way.is_starting:
            wanted = holds_bytes * STARTUP_GAIN + ahead_bytes
        elif now - self._last_fault_at > QUIET_S:
            wanted = holds_bytes * QUIET_GAIN + ahead_bytes
        else:
            wanted = holds_bytes * CRUISE_GAIN + ahead_bytes
        data_rate = way.data_bytes_per_s
        room = data_rate * (way.round_trip_s + DATA_QUEUE_S) if data_rate else UNKNOWN_BYTES_MAX
        self.size_bytes = int(min(max(min(wanted, room), self.floor_bytes), self.ceiling_bytes))
