"""The histograms of faults and of requests, from the receiver's own."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

from prometheus_client.core import Exemplar, HistogramMetricFamily

from farfault_client.engine import Priority
from farfault_client.metrics.slow_faults import SlowFault
from farfault_client.receive.fault_times import FaultTimes, Stage

FIRST_OCTAVE: Final = 3
LAST_OCTAVE: Final = 23
"""Buckets end at 16 us, 32 us, ... 16.8 s: whole octaves, so that the counts are exact and not interpolated."""

Bucket = tuple[str, float] | tuple[str, float, Exemplar]


def fault_histogram(times: FaultTimes, slow: dict[Priority, SlowFault]) -> HistogramMetricFamily:
    """All stages, classes and results that have counted something.

    Args:
        times: of the pager.
        slow: the last slow fault of each class, which becomes the exemplar of its bucket.
    """
    family = HistogramMetricFamily(
        "farfault_fault_seconds",
        "Time from a missed page until the thread goes on, and its parts by stage.",
        labels=("stage", "class", "result"),
    )
    for (stage, priority, result), histogram in times.histograms().items():
        exemplar = slow.get(priority) if stage is Stage.TOTAL else None
        labels = (stage.value, priority.name.lower(), result.value)
        buckets: Any = _buckets(histogram.octaves(), exemplar)
        family.add_metric(labels, buckets, histogram.sum_us * 1e-6)
    return family


def request_histogram(times: FaultTimes) -> HistogramMetricFamily:
    """Round trips of requests by the class of their most urgent page, for classes that had any."""
    family = HistogramMetricFamily(
        "farfault_request_seconds",
        "Time from sending a request until it is answered in full, by the class of its most urgent page.",
        labels=("class",),
    )
    for priority, histogram in times.requests.items():
        if histogram.count:
            buckets: Any = _buckets(histogram.octaves(), None)
            family.add_metric((priority.name.lower(),), buckets, histogram.sum_us * 1e-6)
    return family


def _buckets(octaves: list[int], slow: SlowFault | None) -> list[Bucket]:
    cumulated = list(accumulate(octaves))
    edges_s = [2 ** (octave + 1) * 1e-6 for octave in range(FIRST_OCTAVE, LAST_OCTAVE + 1)]
    buckets: list[Bucket] = [
        (f"{edge_s:.6g}", cumulated[octave]) for octave, edge_s in enumerate(edges_s, FIRST_OCTAVE)
    ]
    buckets.append(("+Inf", cumulated[-1]))
    if slow is not None:
        place = next((index for index, edge_s in enumerate(edges_s) if slow.seconds < edge_s), len(edges_s))
        name, count = buckets[place][:2]
        buckets[place] = (name, count, Exemplar({"fault_id": slow.fault_id}, slow.seconds))
    return buckets
