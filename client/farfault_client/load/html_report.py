"""A result as one HTML file: plots as inline SVG, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path
from typing import Any

from farfault_cli.errors import UsageError

from farfault_client.load.plot import Axis, Series, chart, linear_axis, log_axis
from farfault_client.load.text import microseconds, rows_of, short_time, size

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #5a6472; --rule: #d5dae1;
  --a: #1f63c7; --b: #b4540a; --c: #6b4fbb; --bad: #c22032; --good: #1a7f44; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1d2128; --ink: #e6e9ee; --soft: #9aa5b4;
  --rule: #363d48; --a: #74aaff; --b: #f3a35c; --c: #b7a3f5; --bad: #ff7b87; --good: #5fd08e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 17px; margin: 32px 0 10px; }
.verdict { margin: 4px 0 20px; font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin-bottom: 10px; }
.tile { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 19px; font-variant-numeric: tabular-nums; white-space: nowrap; }
 .tile span { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 12px; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: 6px; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 13px; } svg .y { text-anchor: end; } svg .x, svg .name { text-anchor: middle; }
.grid { stroke: var(--rule); } .tick { stroke: var(--soft); }
.limit { stroke: var(--bad); stroke-dasharray: 2 4; stroke-width: 2; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dashed { stroke-dasharray: 6 5; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); } .line.c { stroke: var(--c); }
.line.bad { stroke: var(--bad); }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.c { fill: var(--c); } .dot.bad { fill: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; color: var(--soft); font-size: 13px; margin-top: 4px; }
.legend i { display: inline-block; width: 16px; border-top: 3px solid; margin-right: 6px; vertical-align: middle; }
.legend i.a { border-color: var(--a); } .legend i.b { border-color: var(--b); } .legend i.c { border-color: var(--c); }
.legend i.bad { border-color: var(--bad); } .legend i.dashed { border-top-style: dashed; }
.legend i.dots { width: 0; border-style: solid; border-width: 4px; border-radius: 4px; }
td.why { min-width: 17em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 16px 12px 32px; } svg text { font-size: 19px; } figure { padding: 8px; } }
"""


def write_html(path: Path, figures: dict[str, Any]) -> None:
    """Writes the report. Raises UsageError where it cannot be written."""
    try:
        path.write_text(html_of(figures))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def html_of(figures: dict[str, Any]) -> str:
    """The report of a result."""
    title = f"Load test of {figures['setup']['target']}"
    charts = [latency_by_percentile(figures), distribution(figures), *over_time(figures)]
    if (figures["slo"] or {}).get("steps"):
        charts.insert(0, search(figures["slo"]))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{_verdict(figures)}{_tiles(figures)}"
        f'<div class="charts">{"".join(charts)}</div>{_comparison(figures)}{_steps(figures)}{_facts(figures)}'
        "</main></body></html>\n"
    )


# ---- charts ------------------------------------------------------------------------------------------


def latency_by_percentile(figures: dict[str, Any]) -> str:
    """Latency over percentile; the axis gives each further nine the same room."""
    series = [Series("latency", _tail(figures["percentiles"]), "a")]
    earlier = (figures.get("compare") or {}).get("earlier_percentiles")
    if earlier:
        series.append(Series("earlier run", _tail(earlier), "b", is_dashed=True))
    points = [point for line in series for point in line.points] or [(1.0, 1.0)]
    highest = max(10.0, *(across for across, _ in points))
    ticks = [mark for mark in (2.0, 10.0, 100.0, 1e3, 1e4, 1e5) if mark <= highest * 1.001]
    x = Axis(1.0, highest, ticks, _percent, is_log=True)
    y = log_axis((up for _, up in points), short_time)
    return chart("Latency by percentile", x, y, series, x_name="share of faults that waited no longer")


def _tail(percentiles: list[list[float]]) -> list[tuple[float, float]]:
    """``(1 / share still waiting, microseconds)``; the maximum, which has no such place, is at the right end."""
    below = [(1.0 / (1.0 - share / 100.0), value) for share, value in percentiles if share < 100.0]
    if below and percentiles[-1][0] >= 100.0:
        below.append((below[-1][0] * 1.2, percentiles[-1][1]))
    return below


def _percent(odds: float) -> str:
    return f"{100.0 * (1.0 - 1.0 / odds):.5g}%"


def distribution(figures: dict[str, Any]) -> str:
    """The share of faults that waited no longer than a time."""
    series = [Series("latency", _cumulative(figures["percentiles"]), "a")]
    earlier = (figures.get("compare") or {}).get("earlier_percentiles")
    if earlier:
        series.append(Series("earlier run", _cumulative(earlier), "b", is_dashed=True))
    x = log_axis((across for line in series for across, _ in line.points), short_time)
    y = linear_axis(0.0, 100.0, lambda value: f"{value:g}%")
    return chart("Share of faults by latency", x, y, series, x_name="waited no longer than")


def _cumulative(percentiles: list[list[float]]) -> list[tuple[float, float]]:
    return [(value, share) for share, value in percentiles]


def over_time(figures: dict[str, Any]) -> list[str]:
    """Rate and latency over time."""
    points = figures["intervals"]
    end = max((point["t_s"] + point["length_s"] for point in points), default=1.0)
    x = linear_axis(0.0, end, lambda value: f"{value:g} s")

    def line(key: str) -> list[tuple[float, float]]:
        return [(point["t_s"] + point["length_s"] / 2, point[key]) for point in points]

    served = Series("served", line("rate_pages_s"), "a")
    rates = [served]
    if figures["open_loop"]:
        rates.append(Series("due", line("offered_pages_s"), "b", is_dashed=True))
    highest = max((value for series in rates for _, value in series.points), default=1.0)
    latencies = [
        Series("p50", line("p50_us"), "a"),
        Series("p99", line("p99_us"), "b"),
        Series("max", line("max_us"), "c"),
    ]
    y = log_axis((value for series in latencies for _, value in series.points), short_time)
    return [
        chart("Pages a second over time", x, linear_axis(0.0, highest or 1.0, _count), rates, x_name="time"),
        chart("Latency over time", x, y, latencies, x_name="time"),
    ]


def search(slo: dict[str, Any]) -> str:
    """What each rate of a search came to, for the first objective."""
    objective = slo["objectives"][0]
    points = sorted((step["offered_pages_s"], step["measured_us"][0], step["holds"]) for step in slo["steps"])
    series = [
        Series("holds", [(rate, value) for rate, value, holds in points if holds], "a", has_line=False),
        Series("broken", [(rate, value) for rate, value, holds in points if not holds], "bad", has_line=False),
    ]
    x = log_axis((rate for rate, _, _ in points), _count)
    y = log_axis([objective["bound_us"], *(value for _, value, _ in points)], short_time)
    title = f"{objective['figure']} by rate; the line is the objective, {short_time(objective['bound_us'])}"
    return chart(title, x, y, series, x_name="faults offered a second", limit=objective["bound_us"])


def _count(value: float) -> str:
    return f"{value / 1000:g} k" if value >= 1000 else f"{value:g}"


# ---- words -------------------------------------------------------------------------------------------


def _verdict(figures: dict[str, Any]) -> str:
    slo = figures["slo"]
    if figures["verification_errors"]:
        text, style = f"{figures['verification_errors']:,} pages or answers were wrong", "bad"
    elif figures["errors"]:
        text, style = f"{figures['errors']:,} faults failed", "bad"
    elif slo is not None and not slo["holds"]:
        text, style = "The objective is broken: " + "; ".join(slo["broken"]), "bad"
    elif slo is not None and "steps" in slo:
        text, style = f"The objective holds up to {slo['rate_pages_s']:,.0f} pages a second", "good"
    else:
        text, style = "Every page came and was right" + ("; the objective holds" if slo else ""), "good"
    return f'<p class="verdict {style}">{escape(text)}</p>'


def _tiles(figures: dict[str, Any]) -> str:
    latency = figures["latency_us"]
    tiles = {
        "pages a second": f"{figures['rate_pages_s']:,.0f}",
        "throughput": f"{size(figures['rate_bytes_s'])}/s",
        "latency p50": microseconds(latency["p50"]),
        "latency p99": microseconds(latency["p99"]),
        "latency p99.9": microseconds(latency["p999"]),
        "latency max": microseconds(latency["max"]),
    }
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{name}</span></div>' for name, value in tiles.items()
    )
    return f'<div class="tiles">{shown}</div>'


def _facts(figures: dict[str, Any]) -> str:
    rows = [(name, escape(value)) for name, value in rows_of(figures)]
    rows.append(("command", f"<code>{escape(shlex.join(figures['setup']['command']))}</code>"))
    body = "".join(f"<tr><th>{escape(name)}</th><td>{value}</td></tr>" for name, value in rows)
    problems = "".join(f"<li><code>{escape(problem)}</code></li>" for problem in figures["problems"])
    return f"<h2>All facts</h2><table>{body}</table>" + (f"<ul>{problems}</ul>" if problems else "")


def _steps(figures: dict[str, Any]) -> str:
    steps = (figures["slo"] or {}).get("steps")
    if not steps:
        return ""
    body = "".join(
        f'<tr><td class="n">{step["offered_pages_s"]:,.0f}</td><td class="n">{step["rate_pages_s"]:,.0f}</td>'
        + "".join(f'<td class="n">{microseconds(step["latency_us"][name])}</td>' for name in ("p50", "p99", "max"))
        + (
            '<td class="good">holds</td>'
            if step["holds"]
            else f'<td class="bad why">{escape("; ".join(step["broken"]))}</td>'
        )
        + "</tr>"
        for step in steps
    )
    head = "".join(f'<th class="n">{name}</th>' for name in ("offered/s", "served/s", "p50", "p99", "max"))
    return f'<h2>Measurements</h2><div class="scroll"><table><tr>{head}<th>objective</th></tr>{body}</table></div>'


def _comparison(figures: dict[str, Any]) -> str:
    compared = figures.get("compare")
    if not compared:
        return ""
    body = "".join(
        f'<tr><th>{escape(name)}</th><td class="n">{compared["earlier"][name]:,.1f}</td>'
        f'<td class="n">{f"{ratio:.2f}x" if ratio is not None else "-"}</td></tr>'
        for name, ratio in compared["ratios"].items()
    )
    notes = "".join(
        f"<p>Not alike: {escape(name)} was {escape(json.dumps(old))}, is {escape(json.dumps(new))}.</p>"
        for name, (old, new) in compared["differences"].items()
    )
    head = '<tr><th>figure</th><th class="n">earlier</th><th class="n">now / earlier</th></tr>'
    return f"<h2>Compared with the earlier run</h2><table>{head}{body}</table>{notes}"
