"""Where the time of a fault goes, by stage: how the figures for metrics and reports are kept.

::

    fault ──queue──▶ request sent ──wire──▶ answer here ──install──▶ thread restarted
                                  └server┘ (as the server says; the rest of the round trip is wire)
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from farfault_client.engine import Priority
from farfault_client.receive.histogram import LatencyHistogram


class Stage(Enum):
    """A part of a fault's time."""

    QUEUE = "queue"
    WIRE = "wire"
    SERVER = "server"
    INSTALL = "install"
    TOTAL = "total"


class FaultResult(Enum):
    """How a fault was resolved."""

    FETCHED = "fetched"
    """By the request that was sent for it."""
    JOINED = "joined"
    """By a request that was under way already, or by a zero page made here."""
    PRESENT = "present"
    """The page was there: a lost race."""


class Sent(NamedTuple):
    """A request that is under way: when it was sent, in seconds of the monotonic clock, and its most urgent page."""

    at: float
    priority: Priority


class Trip(NamedTuple):
    """An answer that is being handled; times in seconds of the monotonic clock."""

    sent_at: float
    answered_at: float
    server_s: float


class FaultTimes:
    """Histograms by stage, priority and result; made at first use, at most 5 x 2 x 3 of them.

    Attributes:
        total: of all faults.
        requests: from sending a request until it is answered in full, by priority.
    """

    def __init__(self) -> None:
        self.requests = {priority: LatencyHistogram() for priority in Priority}
        self._histograms: dict[tuple[Stage, Priority, FaultResult], LatencyHistogram] = {}
        self.total = LatencyHistogram()

    def resolved(self, priority: Priority, since: float, now: float, trip: Trip | None, result: FaultResult) -> None:
        """A thread that has missed a page at `since` goes on at `now`; `trip`: the answer that brought it."""
        self.total.observe(now - since)
        self._observe(Stage.TOTAL, priority, result, now - since)
        if trip is None or trip.sent_at < since:
            return
        self._observe(Stage.QUEUE, priority, result, trip.sent_at - since)
        self._observe(Stage.WIRE, priority, result, trip.answered_at - trip.sent_at - trip.server_s)
        self._observe(Stage.SERVER, priority, result, trip.server_s)
        self._observe(Stage.INSTALL, priority, result, now - trip.answered_at)

    def answered(self, sent: Sent, now: float) -> None:
        """A request is answered in full at `now`."""
        self.requests[sent.priority].observe(now - sent.at)

    def histograms(self) -> dict[tuple[Stage, Priority, FaultResult], LatencyHistogram]:
        """All that have counted something."""
        return dict(self._histograms)

    def _observe(self, stage: Stage, priority: Priority, result: FaultResult, seconds: float) -> None:
        key = (stage, priority, result)
        histogram = self._histograms.get(key)
        if histogram is None:
            histogram = self._histograms[key] = LatencyHistogram()
        histogram.observe(seconds)
