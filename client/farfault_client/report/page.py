"""The report as one HTML page: pictures as inline SVG, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from html import escape
from typing import Any, Final

from farfault_client.load.html_report import STYLE
from farfault_client.load.text import microseconds, size
from farfault_client.report.charts import charts_of
from farfault_client.report.reading import Event, MoveRecord
from farfault_client.report.timeline import Timeline

EVENTS_SHOWN_MAX: Final = 500
MORE_STYLE: Final = """
.cell.a, .shade.a { fill: var(--a); background: var(--a); } .cell.b, .shade.b { fill: var(--b); background: var(--b); }
.cell.good, .shade.good { fill: var(--good); background: var(--good); }
.slow { color: var(--b); }
.frame { fill: none; stroke: var(--rule); }
.legend i.shade { width: 16px; height: 11px; border: 0; margin: 0; }
.head { color: var(--soft); margin: 2px 0 0; overflow-wrap: anywhere; }
tr.warning td:nth-child(2) { color: var(--b); } tr.error td:nth-child(2) { color: var(--bad); }
td:first-child { white-space: nowrap; } td:last-child { overflow-wrap: anywhere; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(124px, 1fr)); }
"""


def page_of(record: MoveRecord) -> str:
    """The page."""
    guest_pages, page_bytes = int(record.header["guest_pages"]), int(record.header["page_size_bytes"])
    timeline = Timeline(record)
    charts = "".join(charts_of(timeline, guest_pages * page_bytes, page_bytes)) if record.samples else ""
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(record.header["unix_s"])))
    title = f"Move of {began}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{MORE_STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>"
        f'<p class="head">{size(guest_pages * page_bytes)} of guest memory from {escape(str(record.header["source"]))}'
        f"{_by(record)}</p>"
        f"{_verdict(record)}{_tiles(record.summary)}"
        f'<div class="charts">{charts}</div>'
        f"<h2>Events</h2>{_events(record.events)}"
        f"{_details(record.summary)}</main></body></html>\n"
    )


def _by(record: MoveRecord) -> str:
    source = record.summary.get("fault_source", "")
    return (f", fault source {escape(source)}" if source else "") + (
        f", by {record.receivers} receivers one after the other; the figures are those of the last one"
        if record.receivers > 1
        else ""
    )


def _verdict(record: MoveRecord) -> str:
    """What became of the move, in one sentence."""
    summary = record.summary
    if not summary:
        words, style = f"The record breaks off after {record.end:.1f} s: its receiver was killed, or still runs.", "bad"
    elif summary["phase"] != "done":
        remedy = f" Remedy: {summary['remedy']}." if summary["remedy"] else ""
        words, style = f"Failed: {summary['error'] or 'the receiver was ended'}.{remedy}", "bad"
    else:
        slow = int(summary["slow_faults"])
        many = "1 fault took" if slow == 1 else f"{slow:,} faults took"
        tail = f"; {many} longer than {record.header['slow_fault_s']:g} s" if slow else ""
        words, style = f"Moved: every page is on the destination{tail}.", "slow" if slow else "good"
    return f'<p class="verdict {style}">{escape(words)}</p>'


def _tiles(summary: dict[str, Any]) -> str:
    if not summary:
        return ""
    latency = summary["fault_latency_us"]
    tiles = {
        "downtime": f"{summary['downtime_ms']:.1f} ms" if summary["downtime_ms"] else "–",
        "post-copy": f"{summary['postcopy_s']:.2f} s",
        "on the wire": size(summary["bytes_on_wire"]),
        "demand faults": f"{summary['demand_faults']:,}",
        "fault p50": microseconds(latency["p50"]),
        "fault p99": microseconds(latency["p99"]),
        "slowest fault": microseconds(latency["max"]),
        "most blocked vCPU": f"{max(summary['blocked_s_by_vcpu'].values(), default=0.0):.2f} s",
    }
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>' for name, value in tiles.items()
    )
    return f'<div class="tiles">{cells}</div>'


def _events(events: list[Event]) -> str:
    if not events:
        return "<p>Nothing happened.</p>"
    lines = "".join(
        f'<tr class="{escape(event.level)}"><td class="n">{event.at:.3f} s</td><td>{escape(event.level)}</td>'
        f"<td>{escape(event.text)}</td></tr>"
        for event in events[:EVENTS_SHOWN_MAX]
    )
    more = (
        f"<p>{len(events) - EVENTS_SHOWN_MAX:,} more are in the record.</p>" if len(events) > EVENTS_SHOWN_MAX else ""
    )
    return (
        '<div class="scroll"><table><tr><th class="n">time</th><th>level</th><th>event</th></tr>'
        f"{lines}</table></div>{more}"
    )


def _details(summary: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in _figures(summary))
    return f'<h2>Figures</h2><div class="scroll"><table>{rows}</table></div>' if rows else ""


def _figures(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not summary:
        return
    latency, counters = summary["fault_latency_us"], summary["counters"]
    yield (
        "pages",
        f"{summary['guest_pages']:,}: {summary['installed_pages']:,} with data, {summary['zero_pages']:,} zero, "
        f"{summary['removed_pages']:,} given back by the guest",
    )
    yield "fault latency", ", ".join(f"{name} {microseconds(latency[name])}" for name in latency)
    yield "faults by source", ", ".join(f"{count:,} {name}" for name, count in summary["faults_by_source"].items())
    for name, lane in summary["lanes"].items():
        yield f"{name} lane", f"{size(lane['bytes'])} over {lane['carrier'] or 'a connection that is down'}"
    for vcpu, seconds in sorted(summary["blocked_s_by_vcpu"].items(), key=lambda item: int(item[0])):
        yield f"vCPU {vcpu} waited", f"{seconds:.3f} s"
    yield "counters", ", ".join(f"{name} {count:,}" for name, count in sorted(counters.items()))
