"""A record of a small move, as its lines."""

from __future__ import annotations

import json
from typing import Any

SUMMARY: dict[str, Any] = {
    "phase": "done",
    "fault_source": "stock-nowait",
    "guest_pages": 1024,
    "page_size_bytes": 4096,
    "installed_pages": 1000,
    "zero_pages": 24,
    "removed_pages": 0,
    "demand_faults": 60,
    "faults_by_source": {"tracepoint_gva": 60},
    "fault_latency_us": {"p50": 812.0, "p90": 1500.0, "p99": 4000.0, "max": 9000.0, "mean": 900.0},
    "downtime_ms": 31.6,
    "postcopy_s": 3.0,
    "bytes_on_wire": 4096000,
    "lanes": {
        "demand": {"carrier": "express", "bytes": 245760},
        "background": {"carrier": "process", "bytes": 3850240},
    },
    "blocked_s_by_vcpu": {"0": 0.6, "1": 0.3},
    "counters": {"existed_pages": 0},
    "slow_faults": 0,
    "error": "",
    "remedy": "",
}


def header(unix_s: float = 1.75e9) -> dict[str, Any]:
    return {
        "type": "header",
        "version": 1,
        "unix_s": unix_s,
        "source": "192.0.2.7:7777",
        "guest_pages": 1024,
        "page_size_bytes": 4096,
        "slow_fault_s": 1.0,
    }


def sample(index: int, *, vcpus: int = 2) -> dict[str, Any]:
    """Of `60`, 50 ms apart."""
    settled = 1024 * index // 60
    return {
        "type": "sample",
        "t": round(index * 0.05, 3),
        "settled": settled,
        "faults": index,
        "waiting": index % 2,
        "longest_wait_s": 0.0,
        "bytes": {"demand": index * 4096, "background": index * 64000},
        "blocked_s": {str(vcpu): index * 0.01 / (vcpu + 1) for vcpu in range(vcpus)},
        "latency": {str(300 + index): 1} if index else {},
        "map": "".join("9" if cell < settled // 8 else "0" for cell in range(128)) if index % 4 == 0 else "",
    }


def move_lines(*, vcpus: int = 2, summary: dict[str, Any] | None = None) -> list[str]:
    """Header, 61 samples, two events, footer."""
    lines: list[dict[str, Any]] = [
        header(),
        {"type": "event", "t": 0.01, "level": "info", "text": "phase: postcopy"},
        *(sample(index, vcpus=vcpus) for index in range(61)),
        {"type": "event", "t": 3.0, "level": "warning", "text": "demand lane lost: <b>reset</b>"},
        {"type": "footer", "t": 3.0, "summary": SUMMARY if summary is None else summary},
    ]
    return [json.dumps(line) for line in lines]
