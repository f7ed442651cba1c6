"""How many background bytes may be in flight: as many as the way holds, and few of them before a fault."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SHRINK_S: Final = 0.005
"""At most once in this time the window shrinks for a fault."""
QUEUE_S: Final = 0.002
"""Round trips may be longer than the shortest one by this much, or by a quarter, while the window still grows."""
PACE_S: Final = 0.00025
"""While threads wait, one background batch is sent in this time: the lane's guaranteed share."""
EPOCH_S: Final = 2.0
"""The shortest round trip is measured anew after this time, with the queue drained first: ways change."""


@dataclass
class BackgroundWindow:
    """The credit of the background lane.

    The window doubles in each round trip (slow start: it finds the bandwidth-delay product in a few of them)
    until round trips become longer, which says that bytes queue up on the way and more of them would only delay
    the next fault. A demand fault takes the queue out of it and leaves what the way itself holds, at most once in
    `SHRINK_S`; and while threads wait one batch goes out each `PACE_S`: so a fault is behind at most one batch
    that was sent after it, and a guest that faults without pause does not starve the background.

    Attributes:
        floor_bytes: never less than this.
        ceiling_bytes: never more than this; fills 20 Gbit/s at 25 ms.
    """

    floor_bytes: int = 512 << 10
    ceiling_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        self.size_bytes = self.floor_bytes
        self._last_shrink_at = float("-inf")
        self._last_sent_at = float("-inf")
        self._shortest_s = float("inf")
        self._latest_s = 0.0
        self._epoch_began_at = float("-inf")
        self._holds_until = float("-inf")

    def allows(self, in_flight_bytes: int, threads_wait: bool, now: float) -> bool:
        """True if another batch may be sent at `now` (seconds)."""
        if in_flight_bytes >= self.size_bytes:
            return False
        return not threads_wait or now - self._last_sent_at >= PACE_S

    def sent(self, now: float) -> None:
        """A background batch was sent."""
        self._last_sent_at = now

    def fault(self, now: float) -> None:
        """A demand fault came at `now` (seconds)."""
        if now - self._last_shrink_at < SHRINK_S:
            return
        self._last_shrink_at = now
        if self._latest_s > self._shortest_s:
            self.size_bytes = max(self.floor_bytes, int(self.size_bytes * self._shortest_s / self._latest_s))

    def arrived(self, size_bytes: int, now: float, round_trip_s: float = 0.0) -> None:
        """Background bytes arrived at `now`, asked for `round_trip_s` ago."""
        if now - self._epoch_began_at > EPOCH_S:
            self._begin_epoch(round_trip_s, now)
        self._shortest_s = min(self._shortest_s, round_trip_s)
        self._latest_s = round_trip_s
        if now < self._holds_until:
            return
        queued_s = round_trip_s - self._shortest_s
        if queued_s <= max(QUEUE_S, self._shortest_s / 4):
            self.size_bytes = min(self.ceiling_bytes, self.size_bytes + size_bytes)
        elif queued_s > max(2 * QUEUE_S, self._shortest_s / 2):
            self.size_bytes = max(self.floor_bytes, self.size_bytes - size_bytes // 4)

    def lost(self) -> None:
        """The connection was lost; the next one may go another way."""
        self.size_bytes = self.floor_bytes
        self._shortest_s = float("inf")
        self._epoch_began_at = float("-inf")

    def _begin_epoch(self, round_trip_s: float, now: float) -> None:
        """Leaves as much in flight as the way holds without a queue, until what was sent before has arrived."""
        if self._shortest_s < round_trip_s:
            self.size_bytes = max(self.floor_bytes, int(self.size_bytes * self._shortest_s / round_trip_s))
            self._holds_until = now + round_trip_s
        self._epoch_began_at = now
        self._shortest_s = float("inf")
