"""Where the time of a fault goes, by stage: how the figures for metrics and reports are kept.

::

    fault ──queue──▶ request sent ──wire──▶ answer here ──install──▶ thread restarted
                                  └server┘ (as the server says; the rest of the round trip is wire)
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

from farfault_client.engine import Priority
from farfault_client.receive.histogram import LatencyHistogram


class Stage(StrEnum):
    """A part of a fault's time."""

    QUEUE = "queue"
    WIRE = "wire"
    SERVER = "server"
    INSTALL = "install"
    TOTAL = "total"


_QUEUE, _WIRE, _SERVER, _INSTALL, _TOTAL = Stage  # bound once: a look-up of a member costs as much as its use


class FaultResult(StrEnum):
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


NOTED_MAX: Final = 256
"""Faults and requests that wait to be counted; a few hundred at once take a fraction of what each takes alone."""


class FaultTimes:
    """Histograms by stage, priority and result; made at first use, at most 5 x 2 x 3 of them.

    What happens is noted, and counted when somebody looks or many notes have come together: a thread waits meanwhile.
    """

    def __init__(self) -> None:
        self._requests = {priority: LatencyHistogram() for priority in Priority}
        self._stages: dict[tuple[Priority, FaultResult], dict[Stage, LatencyHistogram]] = {}
        self._resolved: list[tuple[Priority, float, float, Trip | None, FaultResult]] = []
        self._answered: list[tuple[Sent, float]] = []

    def resolved(self, priority: Priority, since: float, now: float, trip: Trip | None, result: FaultResult) -> None:
        """A thread that has missed a page at `since` goes on at `now`; `trip`: the answer that brought it."""
        self._resolved.append((priority, since, now, trip, result))
        if len(self._resolved) >= NOTED_MAX:
            self._count()

    def answered(self, sent: Sent, now: float) -> None:
        """A request is answered in full at `now`."""
        self._answered.append((sent, now))
        if len(self._answered) >= NOTED_MAX:
            self._count()

    @property
    def requests(self) -> dict[Priority, LatencyHistogram]:
        """From sending a request until it is answered in full, by priority."""
        self._count()
        return self._requests

    @property
    def total(self) -> LatencyHistogram:
        """Of all faults, added up at each call."""
        self._count()
        return LatencyHistogram.sum_of(stages[_TOTAL] for stages in self._stages.values())

    def histograms(self) -> dict[tuple[Stage, Priority, FaultResult], LatencyHistogram]:
        """All that have counted something."""
        self._count()
        return {
            (stage, priority, result): histogram
            for (priority, result), stages in self._stages.items()
            for stage, histogram in stages.items()
            if histogram.count
        }

    def _count(self) -> None:
        resolved, self._resolved = self._resolved, []
        for fault in resolved:
            self._count_fault(*fault)
        answered, self._answered = self._answered, []
        for sent, now in answered:
            self._requests[sent.priority].observe(now - sent.at)

    def _count_fault(
        self, priority: Priority, since: float, now: float, trip: Trip | None, result: FaultResult
    ) -> None:
        stages = self._stages.get((priority, result))
        if stages is None:
            stages = self._stages[priority, result] = {stage: LatencyHistogram() for stage in Stage}
        stages[_TOTAL].observe(now - since)
        if trip is None or trip.sent_at < since:
            return
        stages[_QUEUE].observe(trip.sent_at - since)
        stages[_WIRE].observe(trip.answered_at - trip.sent_at - trip.server_s)
        stages[_SERVER].observe(trip.server_s)
        stages[_INSTALL].observe(now - trip.answered_at)
