"""The state of a move in one message, for the progress bar, `--json` and the control service."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError
from farfault_shim.attach.vmm import AttachedVmm

from farfault_client.engine import PageState
from farfault_client.metrics.memory_cells import cell_counts
from farfault_client.receive.pager import Pager, VcpuKey
from farfault_client.session.lane import Lane
from farfault_client.session.session import Session


@dataclass
class Progress:
    """What only the daemon knows; the rest of a status is read off the pager and the session."""

    phase: rpb.Phase = rpb.PHASE_WAITING
    message: str = ""
    error: str = ""
    remedy: str = ""
    exit_code: int = 0
    downtime_ms: float = 0.0
    running_since: float | None = None
    postcopy_s: float = 0.0
    fault_source: str = ""
    verified_pages: int = 0
    checks: list[rpb.Check] = field(default_factory=list)

    def failed(self, error: FarfaultError, phase: rpb.Phase) -> None:
        self.phase = phase
        self.error, self.remedy, self.exit_code = error.problem, error.remedy, error.exit_code

    def running(self) -> None:
        """The destination runs."""
        self.running_since = time.monotonic()

    def streamed(self) -> None:
        """Every page is there."""
        if self.running_since is not None:
            self.postcopy_s = time.monotonic() - self.running_since


def status_of(
    progress: Progress, session: Session, pager: Pager | None, vmm: AttachedVmm | None, map_cells: int = 0
) -> rpb.MigrationStatus:
    """The status message of this moment.

    Args:
        map_cells: length of `MigrationStatus.map`; 0: none.
    """
    postcopy_s = progress.postcopy_s
    if progress.phase == rpb.PHASE_POSTCOPY and not postcopy_s and progress.running_since is not None:
        postcopy_s = time.monotonic() - progress.running_since
    status = rpb.MigrationStatus(
        phase=progress.phase,
        message=progress.message,
        error=progress.error,
        remedy=progress.remedy,
        exit_code=progress.exit_code,
        downtime_ms=progress.downtime_ms,
        postcopy_s=postcopy_s,
        fault_source=progress.fault_source,
        connected=session.connected,
        checks=progress.checks,
    )
    status.counters["opens"] = session.stats.opens
    status.counters["verified_pages"] = progress.verified_pages
    for lane in Lane:
        stats = session.stats.lanes[lane]
        status.bytes_on_wire += stats.wire_bytes
        status.lanes.add(
            name=lane.value,
            carrier=stats.carrier,
            bytes=stats.wire_bytes,
            connects=stats.connects,
            bad_answers=stats.bad_answers,
        )
    if pager is not None:
        _add_pages(status, pager)
        _add_waits(status, pager, vmm)
        if map_cells:
            status.map = memory_map(pager, map_cells)
    if pager is not None and pager.is_refused and progress.phase == rpb.PHASE_POSTCOPY:
        status.error = f"the page server refuses pages: {pager.last_refusal}; the guest waits"
        status.remedy = "see the page server's log"
    if session.error is not None and not status.error:
        status.error, status.remedy = session.error.problem, session.error.remedy
    return status


def _add_pages(status: rpb.MigrationStatus, pager: Pager) -> None:
    stats, figures = pager.engine.stats, pager.stats.times.total.figures()
    counts = pager.engine.pages.counts()
    status.guest_pages = pager.layout.page_count
    status.page_size_bytes = pager.layout.regions[0].page_size_bytes
    status.installed_pages = stats.installed_pages
    status.zero_pages = stats.zero_pages
    status.removed_pages = stats.removed_pages
    status.demand_faults = stats.demand_faults
    status.background_bytes_per_s = pager.engine.rate.bytes_per_s
    status.faults_by_source.update(pager.stats.faults_by_source)
    status.fault_latency.CopyFrom(
        rpb.LatencySummary(
            p50_us=figures.p50_us,
            p90_us=figures.p90_us,
            p99_us=figures.p99_us,
            max_us=figures.max_us,
            mean_us=figures.mean_us,
            count=figures.count,
        )
    )
    settled = pager.engine.settled_pages
    if status.postcopy_s and settled:
        status.eta_s = status.postcopy_s * (status.guest_pages - settled) / settled
    counters = status.counters
    counters["absent_pages"] = counts[PageState.ABSENT]
    counters["in_flight_pages"] = counts[PageState.IN_FLIGHT]
    counters["wanted_pages"] = counts[PageState.WANTED]
    counters["settled_pages"] = settled
    counters["existed_pages"] = stats.existed_pages
    counters["clipped_pages"] = stats.clipped_pages
    counters["lost_pages"] = stats.lost_pages
    counters["refused_pages"] = stats.refused_pages
    counters["faults_on_present"] = stats.faults_on_present
    counters["faults_on_flight"] = stats.faults_on_flight
    counters["escalations"] = pager.stats.escalations
    counters["passed_exits"] = pager.stats.passed
    counters["populate_retries"] = pager.stats.populated
    counters["preinstalled_pages"] = pager.stats.preinstalled_pages
    counters["slow_faults"] = pager.slow_faults.count
    counters["waiting"] = len(pager.engine.waiting)
    counters["background_window_bytes"] = pager.engine.window.size_bytes


def _add_waits(status: rpb.MigrationStatus, pager: Pager, vmm: AttachedVmm | None) -> None:
    """Who waits for what, and each vCPU's account as the shim keeps it."""
    now = time.monotonic()
    waiting = {waiter.key: waiter for waiter in pager.engine.waiting}
    status.longest_wait_s = max((now - waiter.since for waiter in waiting.values()), default=0.0)
    if vmm is None:
        return
    for vcpu, counters in vmm.counters().items():
        exits = counters.exits_annotated + counters.exits_bare + counters.exits_mmio
        line = status.vcpus.add(vcpu=vcpu, blocked_s=counters.blocked_ns * 1e-9, exits=exits)
        waiter = waiting.get(VcpuKey(vcpu))
        if waiter is not None:
            line.waiting_s, line.waiting_page = now - waiter.since, waiter.pages[0]
        for name in ("exits_annotated", "exits_bare", "exits_mmio", "kicks", "lost_samples"):
            status.counters[name] += getattr(counters, name)


_ABSENT, _MOVING, _INSTALLED, _REMOVED = range(4)


def memory_map(pager: Pager, cells: int) -> bytes:
    """One byte a cell as `MigrationStatus.map` says; fewer cells than asked for where there are fewer pages."""
    result = bytearray()
    for counts in cell_counts(pager.engine.pages, cells):
        if counts[PageState.WANTED] or counts[PageState.IN_FLIGHT]:
            result.append(_MOVING)
            continue
        result.append(
            max(
                (counts[PageState.ABSENT], _ABSENT),
                (counts[PageState.INSTALLED], _INSTALLED),
                (counts[PageState.REMOVED], _REMOVED),
            )[1]
        )
    return bytes(result)
