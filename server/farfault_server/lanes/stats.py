"""What a lane counts: plain integers, so that the hot path pays almost nothing."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

BUCKETS_US: Final = (5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 250_000, 1_000_000)


class Histogram:
    """Counts of durations by bucket.

    Attributes:
        counts: one for each upper bound in `BUCKETS_US`, and one for all above.
        sum_us: of all durations.
    """

    __slots__ = ("counts", "sum_us")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_US) + 1)
        self.sum_us = 0

    def observe(self, duration_us: int) -> None:
        self.counts[bisect_left(BUCKETS_US, duration_us)] += 1
        self.sum_us += duration_us

    def add(self, counts: list[int], sum_us: int) -> None:
        """Adds what another process counted."""
        self.counts = [ours + theirs for ours, theirs in zip(self.counts, counts, strict=True)]
        self.sum_us += sum_us


class LaneStats:
    """Counters of one lane since the start.

    Attributes:
        requests: that came.
        faults: those of them that a thread waits for.
        batches: that were sent.
        pages_data, pages_zero: answered.
        ranges_refused: that got a status instead of pages.
        bytes: of batches, headers included.
        streams: open now.
        queue: from the arrival of the oldest request of a batch until the batch is begun.
        read: reading, zero test, checksum and packing of a batch.
    """

    INTEGERS: Final = (
        "requests",
        "faults",
        "batches",
        "pages_data",
        "pages_zero",
        "ranges_refused",
        "bytes",
        "streams",
    )
    __slots__ = (*INTEGERS, "queue", "read")

    def __init__(self) -> None:
        self.requests = 0
        self.faults = 0
        self.batches = 0
        self.pages_data = 0
        self.pages_zero = 0
        self.ranges_refused = 0
        self.bytes = 0
        self.streams = 0
        self.queue = Histogram()
        self.read = Histogram()

    def to_json(self) -> dict[str, Any]:
        """For another process of the server."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.INTEGERS}
        fields["queue"] = [self.queue.counts, self.queue.sum_us]
        fields["read"] = [self.read.counts, self.read.sum_us]
        return fields

    def add_json(self, fields: dict[str, Any]) -> None:
        """Adds the counters of another process."""
        for name in self.INTEGERS:
            setattr(self, name, getattr(self, name) + fields[name])
        self.queue.add(*fields["queue"])
        self.read.add(*fields["read"])
