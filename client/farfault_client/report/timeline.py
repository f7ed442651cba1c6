"""A record cut into equal parts of time, few enough to draw."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Final

from farfault_client.report.reading import MoveRecord, Sample

BINS_MAX: Final = 140
BIN_MIN_S: Final = 0.05


class Timeline:
    """Sums by bin; each sample is spread evenly over the bins that it covers.

    Attributes:
        bins: how many.
        bin_s: how long each is.
        faults, settled, waiting: by bin; `settled` is what was reached at its end, `waiting` the most that waited.
        bytes, blocked_s: by lane or vCPU, then by bin.
        latency: by bin, then by histogram bucket.
        maps: by bin; empty before the first map.
    """

    def __init__(self, record: MoveRecord) -> None:
        self.end_s = max(record.end, BIN_MIN_S)
        self.bins = max(1, min(BINS_MAX, int(self.end_s / BIN_MIN_S)))
        self.bin_s = self.end_s / self.bins
        self.faults = [0.0] * self.bins
        self.settled = [0] * self.bins
        self.waiting = [0] * self.bins
        self.bytes: dict[str, list[float]] = defaultdict(lambda: [0.0] * self.bins)
        self.blocked_s: dict[str, list[float]] = defaultdict(lambda: [0.0] * self.bins)
        self.latency: list[Counter[int]] = [Counter() for _ in range(self.bins)]
        self.maps = [""] * self.bins
        for sample in record.samples:
            self._add(sample)
        for seconds in self.blocked_s.values():
            self._push_back(seconds)
        for index in range(1, self.bins):
            self.settled[index] = max(self.settled[index], self.settled[index - 1])
            self.maps[index] = self.maps[index] or self.maps[index - 1]

    def middle_s(self, index: int) -> float:
        """The middle of a bin."""
        return (index + 0.5) * self.bin_s

    def _add(self, sample: Sample) -> None:
        last = self._bin(sample.until)
        self.settled[last] = max(self.settled[last], sample.settled)
        self.waiting[last] = max(self.waiting[last], sample.waiting)
        self.latency[last].update(sample.latency)
        if sample.map:
            self.maps[last] = sample.map
        for index, share in self._cover(sample.since, sample.until):
            self.faults[index] += sample.faults * share
            for lane, count in sample.bytes.items():
                self.bytes[lane][index] += count * share
            for vcpu, seconds in sample.blocked_s.items():
                self.blocked_s[vcpu][index] += seconds * share

    def _push_back(self, seconds: list[float]) -> None:
        """A wait is counted when it ends: what does not fit into a bin was waited in the bins before it."""
        for index in range(self.bins - 1, 0, -1):
            excess = max(0.0, seconds[index] - self.bin_s)
            seconds[index] -= excess
            seconds[index - 1] += excess

    def _bin(self, at: float) -> int:
        return min(self.bins - 1, int(at / self.bin_s))

    def _cover(self, since: float, until: float) -> Iterator[tuple[int, float]]:
        """The bins between two moments, each with its share of the time between them."""
        if until <= since:
            yield self._bin(until), 1.0
            return
        for index in range(self._bin(since), self._bin(until) + 1):
            begin, end = index * self.bin_s, (index + 1) * self.bin_s
            covered = min(until, end) - max(since, begin)
            if covered > 0:
                yield index, covered / (until - since)
