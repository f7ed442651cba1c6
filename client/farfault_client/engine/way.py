"""What the background learns about its way to the page server: how fast it is, how long, and whether it is full.

Measured on every answer, as BBR does (Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 14(5),
2016): the highest rate at which bytes came back of late, and the shortest round trip. What was asked for and what had
to be sent for it are measured apart: zero pages are asked for like others, and take no room on the way.
"""

from __future__ import annotations

from typing import Final, NamedTuple

RATE_ROUNDS: Final = 6
"""A rate is forgotten after one to two times as many round trips: whoever else needs the way, or a processor of
ours, takes a part of it."""
EPOCH_S: Final = 2.0
"""A shortest round trip is forgotten after this: ways change."""
SAMPLE_BYTES_MIN: Final = 256 << 10
"""Fewer bytes in a round trip, and their rate tells how long the way is, not how much data it carries."""
STARTUP_GROWTH: Final = 1.25
STARTUP_ROUNDS: Final = 3
"""The way is full when the rate has not grown by `STARTUP_GROWTH` in so many round trips."""


class Departure(NamedTuple):
    """What was known when a request was sent. Times are in seconds.

    Attributes:
        at: when.
        delivered_bytes, data_bytes: how much had been answered by then, and how much of it came with data.
        delivered_at: when the last of it came.
        delivered_sent_at: when that last one had been sent.
    """

    at: float
    delivered_bytes: int
    data_bytes: int
    delivered_at: float
    delivered_sent_at: float


class Way:
    """One connection's way, from its first request on.

    Attributes:
        is_starting: it has not been seen full yet.
        is_draining: an epoch has begun, and nothing that was sent in it has come back: little should be in flight
            meanwhile, so that the first that does shows the way without a queue.
    """

    def __init__(self) -> None:
        self.is_starting = True
        self.is_draining = False
        self._delivered_bytes = 0
        self._data_bytes = 0
        self._delivered_at = 0.0
        self._delivered_sent_at = 0.0
        self._highest = [0.0, 0.0]  # of the last `RATE_ROUNDS` and of these
        self._highest_with_data = [0.0, 0.0]
        self._data_rounds = 0
        self._is_round_with_data = False
        self._shortest_s = float("inf")
        self._epoch_began_at = -1.0  # not yet
        self._round_ends_at_bytes = 0
        self._rounds = 0
        self._full_rate = 0.0
        self._rounds_without_growth = 0

    @property
    def bytes_per_s(self) -> float:
        """The highest rate of late; 0: nothing has come back yet."""
        return max(self._highest)

    @property
    def data_bytes_per_s(self) -> float:
        """The same of answers that were mostly data, however long ago; 0: none has come."""
        return max(self._highest_with_data)

    @property
    def round_trip_s(self) -> float:
        """The shortest round trip of late; infinite: nothing has come back yet."""
        return self._shortest_s

    @property
    def holds_bytes(self) -> float:
        """What is in flight when the way is full and nothing queues up; 0: nothing has come back yet."""
        rate = self.bytes_per_s
        return rate * self._shortest_s if rate else 0.0

    def departed(self, in_flight_bytes: int, now: float) -> Departure:
        """A request was sent while so much was in flight already."""
        if self._epoch_began_at < 0:
            self._epoch_began_at = now
        if not in_flight_bytes:
            self._delivered_at = self._delivered_sent_at = now  # nothing could come back in the meantime
        return Departure(now, self._delivered_bytes, self._data_bytes, self._delivered_at, self._delivered_sent_at)

    def arrived(self, size_bytes: int, data_bytes: int, now: float, departure: Departure) -> None:
        """Its answer has come, with data for so many of the bytes that were asked for."""
        self._delivered_bytes += size_bytes
        self._data_bytes += data_bytes
        self._delivered_at, self._delivered_sent_at = now, departure.at
        round_trip_s = max(now - departure.at, 1e-9)
        if departure.at < self._epoch_began_at:
            self._shortest_s = min(self._shortest_s, round_trip_s)
        elif self.is_draining:
            self._shortest_s, self.is_draining = round_trip_s, False
        else:
            self._shortest_s = min(self._shortest_s, round_trip_s)
            if now - self._epoch_began_at > EPOCH_S:
                self._epoch_began_at, self.is_draining = now, True
        # Answers that waited for us come in one burst: then the time over which they had been asked for is the longer.
        took_s = max(now - departure.delivered_at, departure.at - departure.delivered_sent_at, round_trip_s)
        came_bytes = self._delivered_bytes - departure.delivered_bytes
        came_with_data = self._data_bytes - departure.data_bytes
        self._highest[-1] = max(self._highest[-1], came_bytes / took_s)
        if 2 * came_with_data >= came_bytes >= SAMPLE_BYTES_MIN:
            self._is_round_with_data = True
            self._highest_with_data[-1] = max(self._highest_with_data[-1], came_with_data / took_s)
        if departure.delivered_bytes >= self._round_ends_at_bytes:
            self._begin_round()

    def _begin_round(self) -> None:
        """What was in flight when the last round began has come back."""
        self._round_ends_at_bytes = self._delivered_bytes
        self._rounds += 1
        rate = self.bytes_per_s
        if self._rounds % RATE_ROUNDS == 0:
            self._highest = [self._highest[-1], 0.0]
        self._data_rounds += self._is_round_with_data
        if self._is_round_with_data and self._data_rounds % RATE_ROUNDS == 0:
            self._highest_with_data = [self._highest_with_data[-1], 0.0]
        self._is_round_with_data = False
        if not self.is_starting:
            return
        if rate >= self._full_rate * STARTUP_GROWTH:
            self._full_rate, self._rounds_without_growth = rate, 0
            return
        self._rounds_without_growth += 1
        self.is_starting = self._rounds_without_growth < STARTUP_ROUNDS
