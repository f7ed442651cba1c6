"""What was counted in a stretch of time: numbers and HDR histograms, which add up over time and over processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from hdrh.histogram import HdrHistogram

LATENCY_US_MAX = 1_000_000_000
"""1000 s; a longer wait counts as this."""
SIGNIFICANT_DIGITS = 3
PRECISION = 10.0**-SIGNIFICANT_DIGITS
"""Values this share apart may be told as one."""


def new_histogram() -> HdrHistogram:
    """Microseconds, 1 to `LATENCY_US_MAX`, within 0.1 %."""
    return HdrHistogram(1, LATENCY_US_MAX, SIGNIFICANT_DIGITS)


def record(histogram: HdrHistogram, seconds: float, count: int = 1) -> None:
    """Counts a duration; less than 1 us counts as 1 us."""
    us = int(seconds * 1e6)
    histogram.record_value(1 if us < 1 else min(us, LATENCY_US_MAX), count)


@dataclass(slots=True)
class Tally:
    """Counters of one stretch of time.

    Attributes:
        started_at, ended_at: on CLOCK_MONOTONIC, in seconds.
        offered: faults that fell due; in a closed loop those that were issued.
        faults: faults that were answered; several may have waited for one page.
        pages: pages that came because of them.
        page_bytes: size of these pages, zero pages included.
        writes: answered faults that were writes.
        errors: faults that were refused or never answered.
        unfinished: faults of an open loop that were due but not issued before the end: it could not keep up.
        unexpected: pages that nobody had asked for.
        asked_again: pages that were lost with a connection and asked for again.
        latency: from when a fault was due until its page had come; of an unfinished one until the end.
        service: from when it was issued; the same as latency in a closed loop, where it stays empty.
        issue_delay: from when it was due until it was issued; open loop only.
    """

    started_at: float = 0.0
    ended_at: float = 0.0
    offered: int = 0
    faults: int = 0
    pages: int = 0
    page_bytes: int = 0
    writes: int = 0
    errors: int = 0
    unfinished: int = 0
    unexpected: int = 0
    asked_again: int = 0
    latency: HdrHistogram = field(default_factory=new_histogram)
    service: HdrHistogram = field(default_factory=new_histogram)
    issue_delay: HdrHistogram = field(default_factory=new_histogram)

    def to_json(self) -> dict[str, Any]:
        """JSON values; histograms in HdrHistogram's own compressed form."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            values[item.name] = value.encode().decode() if item.name in HISTOGRAMS else value
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """What `to_json` wrote."""
        return cls(**{name: decode(value) if name in HISTOGRAMS else value for name, value in values.items()})


HISTOGRAMS = ("latency", "service", "issue_delay")
_TIMES = ("started_at", "ended_at")


def decode(text: str) -> HdrHistogram:
    """A histogram from its compressed form."""
    histogram = new_histogram()
    histogram.decode_and_add(text)
    return histogram


def merged(tallies: Iterable[Tally]) -> Tally:
    """The sum; it lasts from the earliest start to the latest end."""
    total = Tally()
    for tally in tallies:
        for item in fields(Tally):
            if item.name in HISTOGRAMS:
                getattr(total, item.name).add(getattr(tally, item.name))
            elif item.name not in _TIMES:
                setattr(total, item.name, getattr(total, item.name) + getattr(tally, item.name))
        total.started_at = min(total.started_at or tally.started_at, tally.started_at)
        total.ended_at = max(total.ended_at, tally.ended_at)
    return total


SHARES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


def percentiles_us(histogram: HdrHistogram) -> dict[str, float]:
    """``p50``, ``p90``, ``p99``, ``p999``, ``max`` in microseconds; all 0 where nothing was counted."""
    if not histogram.get_total_count():
        return dict.fromkeys(SHARES, 0.0)
    values = histogram.get_percentile_to_value_dict(list(SHARES.values()))
    return {name: float(values[share]) for name, share in SHARES.items()}


def figures_us(histogram: HdrHistogram) -> dict[str, float]:
    """The percentiles and ``mean``, which takes milliseconds to find."""
    mean = float(histogram.get_mean_value()) if histogram.get_total_count() else 0.0
    return {**percentiles_us(histogram), "mean": round(mean, 1)}
