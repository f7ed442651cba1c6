"""How many background bytes may be in flight: grows while the guest is quiet, yields while it waits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

QUIET_S: Final = 0.005
"""A guest without a demand fault for this long is quiet."""
QUEUE_S: Final = 0.002
"""Round trips may be longer than the shortest one by this much, or by a quarter, while the window still grows."""
PACE_S: Final = 0.005
"""While threads wait, one background batch is sent in this time: the lane's guaranteed share."""
SHORTEST_MEMORY_S: Final = 5.0
"""The shortest round trip is that of the last 5 to 10 seconds."""


@dataclass
class BackgroundWindow:
    """The credit of the background lane.

    While the guest is quiet the window doubles in each round trip (slow start: it finds the bandwidth-delay
    product in a few of them) until round trips become longer, which says that bytes queue up on the way and
    more of them would only delay the next fault. It halves at a demand fault, at most once in `QUIET_S`, and
    while threads wait one batch goes out each `PACE_S`: so a fault is behind at most one batch that was sent
    after it, and a guest that faults without pause does not starve the background.

    Attributes:
        floor_bytes: never less than this.
        ceiling_bytes: never more than this; fills 20 Gbit/s at 25 ms.
    """

    floor_bytes: int = 512 << 10
    ceiling_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        self.size_bytes = self.floor_bytes
        self._last_fault_at = float("-inf")
        self._last_shrink_at = float("-inf")
        self._last_sent_at = float("-inf")
        self._shortest_s = [float("inf"), float("inf")]
        self._epoch_began_at = float("-inf")

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
        self._last_fault_at = now
        if now - self._last_shrink_at >= QUIET_S:
            self._last_shrink_at = now
            self.size_bytes = max(self.floor_bytes, self.size_bytes // 2)

    def arrived(self, size_bytes: int, now: float, round_trip_s: float = 0.0) -> None:
        """Background bytes arrived at `now`, asked for `round_trip_s` ago."""
        shortest_s = self._shortest(round_trip_s, now)
        if now - self._last_fault_at < QUIET_S:
            return
        queued_s = round_trip_s - shortest_s
        if queued_s <= max(QUEUE_S, shortest_s / 4):
            self.size_bytes = min(self.ceiling_bytes, self.size_bytes + size_bytes)
        elif queued_s > max(2 * QUEUE_S, shortest_s):
            self.size_bytes = max(self.floor_bytes, self.size_bytes - size_bytes // 4)

    def lost(self) -> None:
        """The connection was lost; the next one may go another way."""
        self.size_bytes = self.floor_bytes
        self._shortest_s = [float("inf"), float("inf")]

    def _shortest(self, round_trip_s: float, now: float) -> float:
        if now - self._epoch_began_at > SHORTEST_MEMORY_S:
            self._epoch_began_at = now
            self._shortest_s = [float("inf"), self._shortest_s[0]]
        self._shortest_s[0] = min(self._shortest_s[0], round_trip_s)
        return min(self._shortest_s)
