"""Prometheus metrics, collected from plain integers when they are asked for: the hot path pays nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from farfault_cli import __version__
from farfault_cli.errors import UsageError
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from farfault_server.lanes.stats import BUCKETS_US, Histogram, LaneStats
from farfault_server.leases.book import MIGRATION
from farfault_server.leases.phases import Phase

if TYPE_CHECKING:
    from farfault_server.server import PageServer

PREFIX: Final = "farfault_server_"
US_PER_S: Final = 1_000_000
LANES: Final = ("demand", "background", "express")


class ServerCollector(Collector):
    """All metrics of a page server. No label names a VM, a lease or a client."""

    def __init__(self, server: PageServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        lanes = self._server.lane_stats()
        yield from _counters(lanes)
        yield _histogram("queue_seconds", "From a request's arrival until its batch is begun.", lanes, "queue")
        yield _histogram("read_seconds", "Reading, zero test, checksum and packing of one batch.", lanes, "read")
        yield from self._states()

    def _states(self) -> Iterator[Metric]:
        server = self._server
        book = server.keeper.book
        leases = GaugeMetricFamily(f"{PREFIX}leases", "Leases that are held.", labels=["kind"])
        migrations = sum(lease.kind == MIGRATION for lease in book.leases.values())
        leases.add_metric(["migration"], migrations)
        leases.add_metric(["clone"], len(book.leases) - migrations)
        yield leases
        phases = GaugeMetricFamily(f"{PREFIX}vm_state", "1 for the state that the VM is in.", labels=["state"])
        for phase in Phase:
            phases.add_metric([phase.value.replace(" ", "_")], int(phase is book.phase))
        yield phases
        memory = GaugeMetricFamily(f"{PREFIX}memory_bytes", "Memory that is served.")
        memory.add_metric([], sum(region.size_bytes for region in server.regions))
        yield memory
        up = GaugeMetricFamily(f"{PREFIX}background_process_up", "1 while bulk has a process of its own.")
        up.add_metric([], int(server.background is not None and server.background.is_up))
        yield up
        yield InfoMetricFamily(f"{PREFIX}build", "The version that runs.", {"version": __version__})


def _counters(lanes: dict[str, LaneStats]) -> Iterator[Metric]:
    def counter(name: str, help_text: str, attribute: str) -> CounterMetricFamily:
        family = CounterMetricFamily(PREFIX + name, help_text, labels=["lane"])
        for lane, stats in lanes.items():
            family.add_metric([lane], getattr(stats, attribute))
        return family

    yield counter("requests", "Requests that came.", "requests")
    yield counter("fault_requests", "Requests that came and that a thread waits for.", "faults")
    yield counter("batches", "Batches that were sent.", "batches")
    yield counter("sent_bytes", "Bytes of batches, headers included.", "bytes")
    yield counter("refused_ranges", "Ranges that got a status instead of pages.", "ranges_refused")
    pages = CounterMetricFamily(f"{PREFIX}pages", "Pages that were answered.", labels=["lane", "kind"])
    streams = GaugeMetricFamily(f"{PREFIX}streams", "Streams that are open.", labels=["lane"])
    for lane, stats in lanes.items():
        pages.add_metric([lane, "data"], stats.pages_data)
        pages.add_metric([lane, "zero"], stats.pages_zero)
        streams.add_metric([lane], stats.streams)
    yield pages
    yield streams


def _histogram(name: str, help_text: str, lanes: dict[str, LaneStats], attribute: str) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, help_text, labels=["lane"])
    for lane, stats in lanes.items():
        histogram: Histogram = getattr(stats, attribute)
        total, buckets = 0, []
        for bound, count in zip([*(f"{us / US_PER_S:g}" for us in BUCKETS_US), "+Inf"], histogram.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric([lane], buckets, sum_value=histogram.sum_us / US_PER_S)
    return family


def serve_metrics(server: PageServer, host: str, port: int) -> int:
    """Answers Prometheus on a port of its own, from a thread.

    Returns:
        The port that is bound.

    Raises:
        UsageError: the address cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(ServerCollector(server))
    try:
        http, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} for metrics: {error.strerror}", "name another address with --metrics"
        ) from error
    return http.server_port
