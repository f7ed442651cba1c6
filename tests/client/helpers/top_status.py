"""Statuses as a receiver gives them."""

from __future__ import annotations

from farfault.v1 import receiver_pb2 as rpb

GUEST_PAGES = 65536


def make_status(
    *,
    settled: int = 0,
    faults: int = 0,
    demand_bytes: int = 0,
    connects: int = 1,
    blocked_s: float = 0.0,
    waiting_s: float = 0.0,
    waiting_page: int = 0,
    vcpus: int = 2,
    phase: rpb.Phase = rpb.PHASE_POSTCOPY,
) -> rpb.MigrationStatus:
    """The first vCPU has `blocked_s` and waits; the others run."""
    moved = settled * 512 // GUEST_PAGES
    status = rpb.MigrationStatus(
        phase=phase,
        guest_pages=GUEST_PAGES,
        page_size_bytes=4096,
        demand_faults=faults,
        connected=True,
        fault_source="stock-nowait",
        faults_by_source={"tracepoint_gva": faults},
        fault_latency=rpb.LatencySummary(p50_us=812, p90_us=1534, p99_us=4620, max_us=81942, count=faults),
        longest_wait_s=waiting_s,
        eta_s=3.2,
        postcopy_s=1.9,
        background_bytes_per_s=100_000_000,
        map=bytes([2] * moved + [1] * 8 + [0] * (512 - 8 - moved)),
    )
    status.counters["settled_pages"] = settled
    status.counters["waiting"] = int(waiting_s > 0)
    status.counters["background_window_bytes"] = 512 << 10
    status.lanes.add(name="demand", carrier="express", bytes=demand_bytes, connects=connects)
    status.lanes.add(name="background", carrier="process", bytes=settled * 4096, connects=connects)
    for vcpu in range(vcpus):
        status.vcpus.add(vcpu=vcpu, exits=faults // vcpus, blocked_s=0.0 if vcpu else blocked_s)
    if vcpus:
        status.vcpus[0].waiting_s, status.vcpus[0].waiting_page = waiting_s, waiting_page
    return status
