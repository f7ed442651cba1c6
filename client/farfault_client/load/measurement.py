"""One measurement: what all workers counted, over time and in all."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from farfault_client.load.tally import Tally, merged, percentiles_us

INTERVALS_MAX = 2000
"""Points in time that are kept; for longer runs neighbours are merged."""


@dataclass(slots=True)
class Measurement:
    """Tallies and ends of one run.

    Attributes:
        rate_per_s: that was asked for; None: closed loop or a trace.
        measured_from: when the warm-up ended, on CLOCK_MONOTONIC.
        duration_s: planned; answers after it count in the last interval.
        interval_s: length of one point in time.
        intervals: what the faulting workers counted, by number of the interval.
        background: what the background worker counted.
        ends: what each worker said at the end, background last.
        broken: objectives that do not hold, in words.
    """

    rate_per_s: float | None
    measured_from: float
    duration_s: float
    interval_s: float = 1.0
    intervals: dict[int, Tally] = field(default_factory=dict)
    background: Tally = field(default_factory=Tally)
    ends: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def add(self, tally: Tally, *, is_background: bool) -> None:
        """A worker's tally has come."""
        if is_background:
            self.background = merged((self.background, tally))
            return
        middle = (tally.started_at + tally.ended_at) / 2
        last = math.ceil(self.duration_s / self.interval_s) - 1
        index = max(0, min(last, int((middle - self.measured_from) / self.interval_s)))
        known = self.intervals.get(index)
        self.intervals[index] = merged((known, tally)) if known is not None else tally
        if len(self.intervals) > INTERVALS_MAX:
            self._halve()

    def _halve(self) -> None:
        self.interval_s *= 2
        pairs: dict[int, list[Tally]] = {}
        for index, tally in self.intervals.items():
            pairs.setdefault(index // 2, []).append(tally)
        self.intervals = {index: merged(tallies) for index, tallies in pairs.items()}

    @property
    def total(self) -> Tally:
        """Everything that was counted."""
        return merged(self.intervals.values())

    @property
    def elapsed_s(self) -> float:
        """From the end of the warm-up until the last answer, or until the end of the run."""
        return (
            max((tally.ended_at for tally in self.intervals.values()), default=self.measured_from) - self.measured_from
        )

    def points(self, newest: int = INTERVALS_MAX) -> list[dict[str, float]]:
        """One row an interval, in order of time; no more than the `newest`."""
        rows = []
        last = max(self.intervals, default=0)
        for index in range(max(0, last + 1 - newest), last + 1):
            tally = self.intervals.get(index, Tally())
            length_s = self.interval_s
            if index == last:
                length_s = max(self.elapsed_s - index * self.interval_s, 1e-3)
            latency = percentiles_us(tally.latency)
            rows.append(
                {
                    "t_s": round(index * self.interval_s, 3),
                    "length_s": round(length_s, 3),
                    "offered_pages_s": round(tally.offered / length_s, 1),
                    "rate_pages_s": round(tally.pages / length_s, 1),
                    "errors": tally.errors,
                    "p50_us": latency["p50"],
                    "p90_us": latency["p90"],
                    "p99_us": latency["p99"],
                    "max_us": latency["max"],
                }
            )
        return rows

    def sum_of(self, name: str) -> Any:
        """A number that every worker says at the end, added up."""
        return sum(end[name] for end in self.ends)
