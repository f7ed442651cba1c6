"""A log-linear latency histogram of fixed size: 1 microsecond to 1000 seconds within 2 %."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2
from operator import add

_PER_OCTAVE = 32
_OCTAVES = 30
"""2^30 us is 1073 s; longer values count in the last bucket."""
_LAST = _PER_OCTAVE * _OCTAVES - 1


@dataclass(frozen=True, slots=True)
class LatencyFigures:
    """Percentiles in microseconds; all 0 where nothing was observed."""

    count: int
    mean_us: float
    p50_us: float
    p90_us: float
    p99_us: float
    max_us: float


class LatencyHistogram:
    """Counts durations. 7.5 KiB whatever the number of observations."""

    def __init__(self) -> None:
        self._buckets = array("Q", bytes(8 * _PER_OCTAVE * _OCTAVES))
        self.count = 0
        self.sum_us = 0.0
        self.max_us = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration; negative ones count as 0."""
        us = seconds * 1e6
        index = 0
        if us > 1:
            index = min(int(log2(us) * _PER_OCTAVE), _LAST)
        elif us < 0:
            us = 0.0
        self._buckets[index] += 1
        self.count += 1
        self.sum_us += us
        self.max_us = max(self.max_us, us)

    @classmethod
    def sum_of(cls, histograms: Iterable[LatencyHistogram]) -> LatencyHistogram:
        """What one histogram would hold that had observed all that these have."""
        total = cls()
        for histogram in histograms:
            total.count += histogram.count
            total.sum_us += histogram.sum_us
            total.max_us = max(total.max_us, histogram.max_us)
            total._buckets = array("Q", map(add, total._buckets, histogram._buckets))
        return total

    def percentile_us(self, share: float) -> float:
        """The smallest bucket edge that at least `share` (0..1) of the observations do not exceed."""
        if not self.count:
            return 0.0
        rank = max(1, ceil(share * self.count))
        seen = 0
        for index, count in enumerate(self._buckets):
            seen += count
            if seen >= rank:
                return min(self.max_us, bucket_edge_us(index))
        return self.max_us

    def octaves(self) -> list[int]:
        """Observations in [2^n, 2^(n+1)) microseconds; the first also counts all shorter ones, the last all longer."""
        return [sum(self._buckets[first : first + _PER_OCTAVE]) for first in range(0, len(self._buckets), _PER_OCTAVE)]

    def counts(self) -> array[int]:
        """A copy of the buckets; `bucket_edge_us` says where each ends."""
        return self._buckets[:]

    def figures(self) -> LatencyFigures:
        mean = self.sum_us / self.count if self.count else 0.0
        return LatencyFigures(
            self.count,
            mean,
            self.percentile_us(0.50),
            self.percentile_us(0.90),
            self.percentile_us(0.99),
            self.max_us,
        )


def bucket_edge_us(index: int) -> float:
    """Where a bucket of `LatencyHistogram.counts` ends."""
    return float(2 ** ((index + 1) / _PER_OCTAVE))
