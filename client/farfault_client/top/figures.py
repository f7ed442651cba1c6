"""What `farfault top` shows of a status, and of what has changed since the one before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from farfault.v1 import receiver_pb2 as rpb

from farfault_client.receive.summary import summary_of


@dataclass(frozen=True, slots=True)
class LaneFigures:
    """A lane; `carrier` is empty while it is down."""

    name: str
    carrier: str
    bytes: int
    bytes_per_s: float
    reconnects: int
    bad_answers: int


@dataclass(frozen=True, slots=True)
class VcpuFigures:
    """A vCPU.

    Attributes:
        blocked_s: for how long it has waited for pages since the move began.
        blocked_share: of the time since the status before, 0..1.
        waiting_s: for the page that it waits for now; 0: it runs.
    """

    vcpu: int
    exits: int
    blocked_s: float
    blocked_share: float
    waiting_s: float
    waiting_page: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One moment of a move. Rates are 0 where there was no status before.

    Attributes:
        settled_pages: installed, zero or removed.
        faults_per_s, moved_bytes_per_s: since the status before.
    """

    status: rpb.MigrationStatus
    settled_pages: int
    faults_per_s: float
    moved_bytes_per_s: float
    lanes: tuple[LaneFigures, ...]
    vcpus: tuple[VcpuFigures, ...]

    @property
    def progress(self) -> float:
        """0..1."""
        return self.settled_pages / self.status.guest_pages if self.status.guest_pages else 0.0

    def to_json(self) -> dict[str, Any]:
        """The summary of the move, and what only a running one has."""
        status = self.status
        return {
            **summary_of(status),
            "connected": status.connected,
            "progress": round(self.progress, 6),
            "settled_pages": self.settled_pages,
            "eta_s": round(status.eta_s, 3),
            "faults_per_s": round(self.faults_per_s, 1),
            "moved_bytes_per_s": round(self.moved_bytes_per_s),
            "longest_wait_s": round(status.longest_wait_s, 6),
            "background_limit_bytes_per_s": status.background_bytes_per_s,
            "lanes": {
                lane.name: {
                    "carrier": lane.carrier,
                    "bytes": lane.bytes,
                    "bytes_per_s": round(lane.bytes_per_s),
                    "reconnects": lane.reconnects,
                    "bad_answers": lane.bad_answers,
                }
                for lane in self.lanes
            },
            "vcpus": {
                str(vcpu.vcpu): {
                    "exits": vcpu.exits,
                    "blocked_s": round(vcpu.blocked_s, 6),
                    "blocked_share": round(vcpu.blocked_share, 4),
                    "waiting_s": round(vcpu.waiting_s, 6),
                    "waiting_page": vcpu.waiting_page if vcpu.waiting_s else None,
                }
                for vcpu in self.vcpus
            },
        }


def figures_of(status: rpb.MigrationStatus, before: rpb.MigrationStatus | None, elapsed_s: float) -> Figures:
    """Args: `before` came `elapsed_s` before `status`; None: it is the first."""
    if before is None or elapsed_s <= 0:
        before, elapsed_s = status, 1.0
    settled = status.counters["settled_pages"]
    return Figures(
        status,
        settled,
        _rate(status.demand_faults, before.demand_faults, elapsed_s),
        _rate(settled, before.counters["settled_pages"], elapsed_s) * status.page_size_bytes,
        _lanes(status, before, elapsed_s),
        _vcpus(status, before, elapsed_s),
    )


def _rate(now: float, then: float, elapsed_s: float) -> float:
    return max(0.0, (now - then) / elapsed_s)  # a receiver that was started anew counts from 0 again


def _lanes(status: rpb.MigrationStatus, before: rpb.MigrationStatus, elapsed_s: float) -> tuple[LaneFigures, ...]:
    bytes_before = {lane.name: lane.bytes for lane in before.lanes}
    return tuple(
        LaneFigures(
            name=lane.name,
            carrier=lane.carrier,
            bytes=lane.bytes,
            bytes_per_s=_rate(lane.bytes, bytes_before.get(lane.name, lane.bytes), elapsed_s),
            reconnects=max(0, lane.connects - 1),
            bad_answers=lane.bad_answers,
        )
        for lane in status.lanes
    )


def _vcpus(status: rpb.MigrationStatus, before: rpb.MigrationStatus, elapsed_s: float) -> tuple[VcpuFigures, ...]:
    blocked_before = {vcpu.vcpu: _blocked_s(vcpu) for vcpu in before.vcpus}
    return tuple(
        VcpuFigures(
            vcpu=vcpu.vcpu,
            exits=vcpu.exits,
            blocked_s=_blocked_s(vcpu),
            blocked_share=min(1.0, _rate(_blocked_s(vcpu), blocked_before.get(vcpu.vcpu, _blocked_s(vcpu)), elapsed_s)),
            waiting_s=vcpu.waiting_s,
            waiting_page=vcpu.waiting_page,
        )
        for vcpu in status.vcpus
    )


def _blocked_s(vcpu: rpb.VcpuStatus) -> float:
    """The VMM counts a wait when it ends; the one of this moment belongs to it."""
    return vcpu.blocked_s + vcpu.waiting_s
