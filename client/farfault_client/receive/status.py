"""The state of a move in one message, for the progress bar, `--json` and the control service."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError
from farfault_shim.attach.vmm import AttachedVmm

from farfault_client.engine import PageState
from farfault_client.receive.pager import Pager
from farfault_client.session.lane import Lane
from farfault_client.session.session import Session


@dataclass
class Progress:
    """What only the daemon knows; the rest of a status is read off the pager and the session."""

    phase: rpb.Phase = rpb.PHASE_WAITING
    message: str = ""
    error: str = ""
    remedy: str = ""
    downtime_ms: float = 0.0
    running_since: float | None = None
    postcopy_s: float = 0.0
    fault_source: str = ""
    checks: list[rpb.Check] = field(default_factory=list)

    def failed(self, error: FarfaultError, phase: rpb.Phase) -> None:
        self.phase = phase
        self.error, self.remedy = error.problem, error.remedy

    def running(self) -> None:
        self.running_since = time.monotonic()
        self.phase = rpb.PHASE_POSTCOPY

    def done(self) -> None:
        if self.running_since is not None:
            self.postcopy_s = time.monotonic() - self.running_since
        self.phase = rpb.PHASE_DONE


def status_of(
    progress: Progress, session: Session, pager: Pager | None, vmm: AttachedVmm | None
) -> rpb.MigrationStatus:
    """The status message of this moment."""
    postcopy_s = progress.postcopy_s
    if progress.phase == rpb.PHASE_POSTCOPY and progress.running_since is not None:
        postcopy_s = time.monotonic() - progress.running_since
    status = rpb.MigrationStatus(
        phase=progress.phase,
        message=progress.message,
        error=progress.error,
        remedy=progress.remedy,
        downtime_ms=progress.downtime_ms,
        postcopy_s=postcopy_s,
        fault_source=progress.fault_source,
        connected=session.connected,
        checks=progress.checks,
    )
    if pager is not None:
        _add_pages(status, pager)
    counters = status.counters
    counters["opens"] = session.stats.opens
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
    if vmm is not None:
        for name, value in vmm_counters(vmm).items():
            counters[name] = value
    return status


def _add_pages(status: rpb.MigrationStatus, pager: Pager) -> None:
    stats, figures = pager.engine.stats, pager.stats.latency.figures()
    counts = pager.engine.pages.counts()
    status.guest_pages = pager.layout.page_count
    status.page_size_bytes = pager.layout.regions[0].page_size_bytes
    status.installed_pages = stats.installed_pages
    status.zero_pages = stats.zero_pages
    status.removed_pages = stats.removed_pages
    status.demand_faults = stats.demand_faults
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
    counters = status.counters
    counters["absent_pages"] = counts[PageState.ABSENT]
    counters["in_flight_pages"] = counts[PageState.IN_FLIGHT]
    counters["wanted_pages"] = counts[PageState.WANTED]
    counters["existed_pages"] = stats.existed_pages
    counters["clipped_pages"] = stats.clipped_pages
    counters["lost_pages"] = stats.lost_pages
    counters["refused_pages"] = stats.refused_pages
    counters["faults_on_present"] = stats.faults_on_present
    counters["escalations"] = pager.stats.escalations
    counters["passed_exits"] = pager.stats.passed
    counters["populate_retries"] = pager.stats.populated
    counters["preinstalled_pages"] = pager.stats.preinstalled_pages
    counters["waiting"] = len(pager.engine.waiting)
    counters["background_window_bytes"] = pager.engine.window.size_bytes


def vmm_counters(vmm: AttachedVmm) -> dict[str, int]:
    """The shim's own counters, summed over vCPUs."""
    totals = {
        "exits_annotated": 0,
        "exits_bare": 0,
        "exits_mmio": 0,
        "kicks": 0,
        "lost_samples": 0,
        "blocked_ns": 0,
    }
    for vcpu in vmm.counters():
        for name in totals:
            totals[name] += getattr(vcpu, name)
    return totals
