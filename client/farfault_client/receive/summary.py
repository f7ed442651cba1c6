"""The figures of a move as scripts get them: one flat JSON object."""

from __future__ import annotations

from typing import Any

from farfault.v1 import receiver_pb2 as rpb


def summary_of(status: rpb.MigrationStatus) -> dict[str, Any]:
    """From the last status of a move; durations in the unit that each name ends with."""
    latency = status.fault_latency
    return {
        "phase": rpb.Phase.Name(status.phase).removeprefix("PHASE_").lower(),
        "fault_source": status.fault_source,
        "guest_pages": status.guest_pages,
        "page_size_bytes": status.page_size_bytes,
        "installed_pages": status.installed_pages,
        "zero_pages": status.zero_pages,
        "removed_pages": status.removed_pages,
        "demand_faults": status.demand_faults,
        "faults_by_source": dict(status.faults_by_source),
        "fault_latency_us": {
            "p50": round(latency.p50_us, 1),
            "p90": round(latency.p90_us, 1),
            "p99": round(latency.p99_us, 1),
            "max": round(latency.max_us, 1),
            "mean": round(latency.mean_us, 1),
        },
        "downtime_ms": round(status.downtime_ms, 3),
        "postcopy_s": round(status.postcopy_s, 4),
        "bytes_on_wire": status.bytes_on_wire,
        "lanes": {lane.name: {"carrier": lane.carrier, "bytes": lane.bytes} for lane in status.lanes},
        "blocked_s_by_vcpu": {str(line.vcpu): round(line.blocked_s, 6) for line in status.vcpus},
        "counters": dict(status.counters),
        "error": status.error,
        "remedy": status.remedy,
    }
