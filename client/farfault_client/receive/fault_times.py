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


class _Resolved(NamedTuple):
    """Arguments of `FaultTimes.resolved`."""

    priority: Priority
    since: float
    now: float
    trip: Trip | None
    result: FaultResult


NOTED_MAX: Final = 256
"""Faults and requests that wait to be counted; a few hundred at once take a fraction of what each takes alone."""


class FaultTimes:
    """Histograms by stage, priority and result; made at first use, at most 5 x 2 x 3 of them.

    What happens is noted, and counted when somebody looks or many notes have come together: a thread waits meanwhile.
    """

    def __init__(self) -> None:
        self._requests = {priority: LatencyHistogram() for priority in Priority}
        self._stages: dict[tuple[Priority, FaultResult], dict[Stage, LatencyHistogram]] = {}
        self._resolved: list[_Resolved] = []
        self._answered: list[tuple[Sent, float]] = []

    def resolved(self, priority: Priority, since: float, now: float, trip: Trip | None, result: FaultResult) -> None:
        """A thread that has missed a page at `since` goes on at `now`; `trip`: the answer that brought it."""
        self._resolved.append(_Resolved(priority, since, now, trip, result))
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
        by_kind: dict[tuple[Priority, FaultResult], list[_Resolved]] = {}
        for fault in resolved:
            by_kind.setdefault((fault.priority, fault.result), []).append(fault)
        for kind, faults in by_kind.items():
            self._count_faults(kind, faults)
        answered, self._answered = self._answered, []
        for priority, histogram in self._requests.items():
            histogram.observe_all(now - sent.at for sent, now in answered if sent.priority is priority)

    def _count_faults(self, kind: tuple[Priority, FaultResult], faults: list[_Resolved]) -> None:
        stages = self._stages.get(kind)
        if stages is None:
            stages = self._stages[kind] = {stage: LatencyHistogram() for stage in Stage}
        stages[_TOTAL].observe_all(fault.now - fault.since for fault in faults)
        trips = [(since, trip, now) for _, since, now, trip, _ in faults if trip is not None and trip.sent_at >= since]
        stages[_QUEUE].observe_all(trip.sent_at - since for since, trip, _ in trips)
        stages[_WIRE].observe_all(trip.answered_at - trip.sent_at - trip.server_s for _, trip, _ in trips)
        stages[_SERVER].observe_all(trip.server_s for _, trip, _ in trips)
        stages[_INSTALL].observe_all(now - trip.answered_at for _, trip, now in trips)
