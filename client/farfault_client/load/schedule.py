"""When the faults of an open loop are due. No clock; a fault that is not issued in time stays due."""

from __future__ import annotations

import math
import random
from typing import Protocol

from farfault_client.load.trace import Trace

BACKLOG_STEPS_MAX = 1000
"""A backlog at the end of a run is counted in at most this many latencies, each for an equal share of it."""


class Schedule(Protocol):
    """Due times in order."""

    def peek(self) -> float | None:
        """When the next fault is due; None: there is none."""

    def advance(self) -> None:
        """The fault that `peek` told of was issued."""

    def backlog(self, until: float) -> list[tuple[float, int]]:
        """``(due, count)`` of all faults that are due before `until` and were not issued; short: see the constant."""


class ConstantRate:
    """Equally spaced faults.

    Args:
        start: when the first is due, in seconds.
        rate_per_s: above 0.
    """

    def __init__(self, start: float, rate_per_s: float) -> None:
        self._start = start
        self._rate = rate_per_s
        self._index = 0

    def peek(self) -> float:
        return self._start + self._index / self._rate

    def advance(self) -> None:
        self._index += 1

    def backlog(self, until: float) -> list[tuple[float, int]]:
        count = max(0, math.ceil((until - self._start) * self._rate) - self._index)
        return spread(self.peek(), until, count)


class PoissonRate:
    """Independent faults: exponential gaps, as many users make together."""

    def __init__(self, start: float, rate_per_s: float, source: random.Random) -> None:
        self._rate = rate_per_s
        self._random = source
        self._due = start + source.expovariate(rate_per_s)

    def peek(self) -> float:
        return self._due

    def advance(self) -> None:
        self._due += self._random.expovariate(self._rate)

    def backlog(self, until: float) -> list[tuple[float, int]]:
        return spread(self._due, until, max(0, round((until - self._due) * self._rate)))


class Recorded:
    """The times of a trace.

    Args:
        start: of the replay.
        trace: whose times.
        speed: 2 is twice as fast as recorded.
    """

    def __init__(self, start: float, trace: Trace, speed: float) -> None:
        self._start = start
        self._seconds = trace.seconds
        self._speed = speed
        self._index = 0

    def peek(self) -> float | None:
        if self._index == len(self._seconds):
            return None
        return self._start + self._seconds[self._index] / self._speed

    def advance(self) -> None:
        self._index += 1

    def backlog(self, until: float) -> list[tuple[float, int]]:
        due = [self._start + seconds / self._speed for seconds in self._seconds[self._index :]]
        late = [moment for moment in due if moment < until]
        step = math.ceil(len(late) / BACKLOG_STEPS_MAX) or 1
        return [(late[first], min(step, len(late) - first)) for first in range(0, len(late), step)]


def spread(first: float, until: float, count: int) -> list[tuple[float, int]]:
    """`count` faults evenly between two times, in at most `BACKLOG_STEPS_MAX` groups."""
    if count <= 0:
        return []
    step = math.ceil(count / BACKLOG_STEPS_MAX)
    gap = (until - first) / count
    return [(first + index * gap, min(step, count - index)) for index in range(0, count, step)]
