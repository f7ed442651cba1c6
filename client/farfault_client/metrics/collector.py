"""A receiver's metrics. Nothing is counted here: each scrape reads what the pager, the session and the shim count.

docs/metrics.md lists every family; a test holds the two together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli import __version__
from farfault_shim.attach.wire import VcpuCounters
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from farfault_client.engine import PageState
from farfault_client.metrics.families import counter, counters, gauge, gauges
from farfault_client.metrics.fault_histogram import fault_histogram, request_histogram
from farfault_client.receive.pager import Pager
from farfault_client.receive.receiver import Receiver
from farfault_client.session.lane import LaneStats
from farfault_client.session.session import Session

PHASES = {
    phase: name.removeprefix("PHASE_").lower() for name, phase in rpb.Phase.items() if phase != rpb.PHASE_UNSPECIFIED
}


class ReceiverCollector(Collector):
    """Families of one receiver. `collect` runs on the receiver's event loop, so that what it reads belongs together.

    Args:
        receiver: a started one.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def collect(self) -> Iterator[Metric]:
        receiver = self._receiver
        assert receiver.pager is not None, "start the receiver first"
        yield gauges("farfault_build_info", "Always 1; the version is a label.", "version", {__version__: 1})
        yield from _move(receiver.status())
        yield from _faults(receiver.pager)
        yield from _vcpus(receiver.pager, receiver.vcpu_counters())
        yield from _pages(receiver.pager)
        yield from _prefetch(receiver.pager)
        yield from _background(receiver.pager)
        yield from _lanes(receiver.session)


def _move(status: rpb.MigrationStatus) -> Iterator[Metric]:
    """How far the move has come."""
    phases = {name: float(status.phase == phase) for phase, name in PHASES.items()}
    settled = status.counters["settled_pages"]
    yield gauges("farfault_phase", "1 for the phase that the move is in, 0 for the others.", "phase", phases)
    yield gauge(
        "farfault_connected", "1 while faults can be fetched, 0 while the page server is away.", status.connected
    )
    yield gauge(
        "farfault_progress_ratio",
        "Share of guest pages that are settled: installed, zero or removed.",
        settled / status.guest_pages if status.guest_pages else 0.0,
    )
    yield gauge("farfault_eta_seconds", "Time until the last page at the speed so far; 0: not known.", status.eta_s)
    yield gauge("farfault_downtime_seconds", "How long the VM stood still at the switchover.", status.downtime_ms / 1e3)
    yield gauge("farfault_postcopy_seconds", "Time since the VM runs here, until its last page.", status.postcopy_s)


def _faults(pager: Pager) -> Iterator[Metric]:
    """Faults, by the ways to look at them."""
    stats, slow, waiting = pager.stats, pager.slow_faults, pager.engine.waiting
    now = time.monotonic()
    yield fault_histogram(stats.times, slow.last)
    yield request_histogram(stats.times)
    yield counters(
        "farfault_faults_total", "Faults by where their address came from.", "source", stats.faults_by_source
    )
    yield gauge("farfault_waiting_threads", "Threads of the guest and its VMM that wait for a page now.", len(waiting))
    yield gauge(
        "farfault_longest_wait_seconds",
        "How long the one of them has waited that has waited longest.",
        max((now - waiter.since for waiter in waiting), default=0.0),
    )
    yield counter("farfault_slow_faults_total", "Faults that took longer than the limit, or still do.", slow.count)
    yield gauge("farfault_slow_fault_limit_seconds", "That limit (--slow-fault).", slow.limit_s)


def _vcpus(pager: Pager, vcpus: dict[int, VcpuCounters]) -> Iterator[Metric]:
    """What the shim in the VMM counts, and what the classifier decided."""
    stats, lines = pager.stats, vcpus.items()
    exits = {
        "annotated": sum(line.exits_annotated for line in vcpus.values()),
        "bare": sum(line.exits_bare for line in vcpus.values()),
        "mmio": sum(line.exits_mmio for line in vcpus.values()),
        "passed": stats.passed,
        "escalated": stats.escalations,
    }
    yield counters(
        "farfault_vcpu_blocked_seconds_total",
        "Time that a vCPU has waited for pages outside of KVM_RUN; a wait is counted when it ends.",
        "vcpu",
        {str(vcpu): line.blocked_ns * 1e-9 for vcpu, line in lines},
    )
    yield counters("farfault_exits_total", "KVM_RUN exits that the shim reported, by kind.", "kind", exits)
    yield counters(
        "farfault_vcpu_kicks_total",
        "Waits that a signal or immediate_exit ended.",
        "vcpu",
        {str(vcpu): line.kicks for vcpu, line in lines},
    )
    yield counter(
        "farfault_lost_samples_total",
        "Tracepoint samples that the kernel dropped; each costs one more exit.",
        sum(line.lost_samples for line in vcpus.values()),
    )
    yield counter(
        "farfault_populate_retries_total", "Exits on a page that was present but not mapped.", stats.populated
    )


def _pages(pager: Pager) -> Iterator[Metric]:
    stats, counts = pager.engine.stats, pager.engine.pages.counts()
    settled = {
        "data": stats.installed_pages,
        "zero": stats.zero_pages,
        "removed": stats.removed_pages,
        "existed": stats.existed_pages,
    }
    memory_bytes = sum(region.size_bytes for region in pager.layout.regions)
    yield gauge("farfault_guest_memory_bytes", "Guest memory, all regions.", memory_bytes)
    yield gauges(
        "farfault_pages",
        "Guest pages by state now.",
        "state",
        {state.name.lower(): counts[state] for state in PageState},
    )
    yield counters("farfault_pages_settled_total", "Pages that need no fetch any more, by reason.", "how", settled)
    yield counter("farfault_pages_refetched_total", "Pages whose request was lost, refused or cut.", stats.lost_pages)
    yield counter("farfault_pages_refused_total", "Pages that the page server refused to send.", stats.refused_pages)
    yield counter(
        "farfault_pages_clipped_total", "Pages that arrived and were not wanted any more.", stats.clipped_pages
    )
    yield counters(
        "farfault_requests_total",
        "Requests to the page server by the class of their most urgent page.",
        "class",
        {priority.name.lower(): count for priority, count in stats.requests_by_priority.items()},
    )


def _prefetch(pager: Pager) -> Iterator[Metric]:
    neighbours = pager.engine.neighbours
    guesses = {"hit": neighbours.hits, "miss": neighbours.misses}
    yield counter(
        "farfault_prefetched_pages_total",
        "Pages asked for as neighbours of faults.",
        pager.engine.stats.prefetched_pages,
    )
    yield counters("farfault_prefetch_guesses_total", "Guesses by what came of them.", "result", guesses)
    yield gauge(
        "farfault_prefetch_hit_ratio", "Share of the pages guessed lately that were of use.", neighbours.hit_rate
    )


def _background(pager: Pager) -> Iterator[Metric]:
    engine = pager.engine
    yield gauge(
        "farfault_background_window_bytes", "How much the background may have in flight.", engine.window.size_bytes
    )
    yield gauge(
        "farfault_background_in_flight_bytes", "How much it has in flight now.", engine.background_in_flight_bytes
    )
    yield gauge("farfault_background_limit_bytes_per_second", "Its bandwidth cap; 0: none.", engine.rate.bytes_per_s)


def _lanes(session: Session) -> Iterator[Metric]:
    def each(figure: Callable[[LaneStats], float]) -> dict[str, float]:
        return {lane.value: figure(stats) for lane, stats in session.stats.lanes.items()}

    yield gauges("farfault_lane_up", "1 while a lane is connected.", "lane", each(lambda lane: bool(lane.carrier)))
    yield counters(
        "farfault_lane_received_bytes_total",
        "Bytes of answers, headers included.",
        "lane",
        each(lambda lane: lane.wire_bytes),
    )
    yield counters(
        "farfault_lane_connects_total",
        "Connections made; all but the first are reconnects.",
        "lane",
        each(lambda lane: lane.connects),
    )
    yield counters(
        "farfault_lane_bad_answers_total",
        "Answers that were dropped: wrong checksum, length or generation.",
        "lane",
        each(lambda lane: lane.bad_answers),
    )
    yield counters(
        "farfault_lane_refusals_total", "Answers with refused ranges.", "lane", each(lambda lane: lane.refusals)
    )
    yield counter("farfault_lease_opens_total", "Times the lease was opened or taken up again.", session.stats.opens)
