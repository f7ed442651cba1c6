"""The result of a load test as one JSON object; text, HTML and comparison are made from it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from farfault_cli import __version__

from farfault_client.load.measurement import Measurement
from farfault_client.load.plan import Arrivals, PatternKind, PatternPlan
from farfault_client.load.slo import Objective, RateSearch
from farfault_client.load.tally import figures_us

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Setup:
    """What a result says about its own making.

    Attributes:
        target: of the page server.
        servers: what each worker learnt about it.
        pattern: what vCPUs touched.
        arrivals: of an open loop.
        rate_per_s: that was asked for; None: closed loop, a trace, or a search.
        vcpus, connections, processes: numbers; the background worker apart.
        warmup_s, duration_s: planned, of one measurement.
        background: a background stream ran beside.
    """

    target: str
    servers: Sequence[dict[str, Any]]
    pattern: PatternPlan
    arrivals: Arrivals
    rate_per_s: float | None
    vcpus: int
    connections: int
    processes: int
    warmup_s: float
    duration_s: float
    background: bool
    open_loop: bool


def figures_of(
    setup: Setup,
    best: Measurement,
    objectives: Sequence[Objective],
    search: RateSearch | None,
    steps: Sequence[Measurement],
) -> dict[str, Any]:
    """The result; its first keys are stable.

    Args:
        setup: how it was made.
        best: the measurement that the figures are of; of a search the highest rate that held, or else the last.
        objectives: that were asked for.
        search: where there was one.
        steps: all measurements.
    """
    total = best.total
    elapsed_s = best.elapsed_s
    rate = total.pages / elapsed_s if elapsed_s > 0 else 0.0
    offered = total.offered / elapsed_s if elapsed_s > 0 else 0.0
    verification_errors = sum(step.sum_of("wrong_pages") + step.sum_of("bad_answers") for step in steps)
    errors = total.errors + best.background.errors
    refusals: Counter[str] = Counter()
    for end in best.ends:
        refusals.update(end["refusals"])
    is_replay = setup.pattern.kind is PatternKind.REPLAY  # some of its accesses may be no faults
    planned = None if is_replay else best.rate_per_s
    return {
        "pages": total.pages,
        "errors": errors,
        "verification_errors": verification_errors,
        "rate_pages_s": round(rate, 1),
        "offered_pages_s": round(planned if planned is not None else offered, 1),
        "latency_us": figures_us(total.latency),
        "open_loop": setup.open_loop,
        "slo": _slo(objectives, best, search, steps),
        "faults": total.faults,
        "unfinished": total.unfinished,
        "writes": total.writes,
        "hits": best.sum_of("hits"),
        "page_bytes": total.page_bytes,
        "rate_bytes_s": round(total.page_bytes / elapsed_s) if elapsed_s > 0 else 0,
        "wire_bytes": int(best.sum_of("wire_bytes")),
        "verified_pages": best.sum_of("verified_pages"),
        "verified_by": setup.servers[0]["verified_by"],
        "problems": [problem for step in steps for end in step.ends for problem in end["problems"]][:10],
        "refusals": dict(refusals),
        "unexpected_pages": total.unexpected + best.background.unexpected,
        "asked_again_pages": total.asked_again + best.background.asked_again,
        "service_us": figures_us(total.service) if setup.open_loop else figures_us(total.latency),
        "issue_delay_us": figures_us(total.issue_delay),
        "reconnects": int(best.sum_of("connects")),
        "elapsed_s": round(elapsed_s, 3),
        "ended_by": best.ends[0]["ended_by"],
        "worker_cpu_share": round(best.sum_of("cpu_s") / (elapsed_s + setup.warmup_s), 3) if elapsed_s > 0 else 0.0,
        "background": _background(best) if setup.background else None,
        "setup": {
            "target": setup.target,
            "carrier": sorted({name for server in setup.servers for name in server["carrier"]}),
            "server_version": setup.servers[0]["server_version"],
            "backing": setup.servers[0]["backing"],
            "memory_bytes": sum(size for size, _ in setup.servers[0]["regions"]),
            "pattern": setup.pattern.kind.value,
            "arrivals": setup.arrivals.value if setup.open_loop else None,
            "write_share": setup.pattern.write_share,
            "refetch": setup.pattern.refetch,
            "vcpus": setup.vcpus,
            "connections": setup.connections,
            "processes": setup.processes,
            "warmup_s": setup.warmup_s,
            "duration_s": setup.duration_s,
            "client_version": __version__,
            "command": ["farfault", *sys.argv[1:]],
        },
        "percentiles": _percentiles(best),
        "intervals": best.points(),
        "histogram": total.latency.encode().decode(),
        "format": FORMAT,
    }


def _slo(
    objectives: Sequence[Objective], best: Measurement, search: RateSearch | None, steps: Sequence[Measurement]
) -> dict[str, Any] | None:
    if not objectives:
        return None
    total = best.total
    slo: dict[str, Any] = {
        "objectives": [
            {
                "figure": objective.figure,
                "bound_us": objective.bound_us,
                "measured_us": round(objective.measure_us(total.latency), 1),
            }
            for objective in objectives
        ],
        "holds": not best.broken,
        "broken": best.broken,
    }
    if search is not None:
        slo["rate_pages_s"] = round(search.holds_per_s, 1)
        slo["steps"] = [_step(step, objectives) for step in steps]
    return slo


def _step(step: Measurement, objectives: Sequence[Objective]) -> dict[str, Any]:
    total = step.total
    return {
        "offered_pages_s": round(step.rate_per_s or 0.0, 1),
        "rate_pages_s": round(total.pages / step.elapsed_s, 1) if step.elapsed_s > 0 else 0.0,
        "faults": total.faults,
        "holds": not step.broken,
        "broken": step.broken,
        "latency_us": figures_us(total.latency),
        "measured_us": [round(objective.measure_us(total.latency), 1) for objective in objectives],
    }


def _background(best: Measurement) -> dict[str, Any]:
    tally = best.background
    seconds = tally.ended_at - tally.started_at
    return {
        "pages": tally.pages,
        "bytes": tally.page_bytes,
        "rate_bytes_s": round(tally.page_bytes / seconds) if seconds > 0 else 0,
        "errors": tally.errors,
        "request_latency_us": figures_us(tally.latency),
    }


def _percentiles(best: Measurement) -> list[list[float]]:
    """``[share in percent, microseconds]``, closer together towards 100 %."""
    histogram = best.total.latency
    if not histogram.get_total_count():
        return []
    rows = []
    for item in histogram.get_percentile_iterator(5):
        share = min(100.0, item.percentile_level_iterated_to)
        rows.append([round(share, 6), float(item.value_iterated_to)])
    return rows
