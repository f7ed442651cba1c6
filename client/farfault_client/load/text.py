"""A result for people: text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

OWN_DELAY_SHARE_MAX = 0.25
"""Where the generator itself was late by more than this share of the p99, the figures say more about its own host."""
LATENCY_NAMES = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9", "max": "max"}


def microseconds(value: float) -> str:
    """``87 us``, ``1.24 ms``, ``2.50 s``."""
    if value < 1000:
        return f"{value:.0f} us"
    if value < 1_000_000:
        return f"{value / 1000:.2f} ms"
    return f"{value / 1_000_000:.2f} s"


def short_time(us: float) -> str:
    """``5 ms``: for round numbers, without trailing zeros."""
    for unit, per_unit in (("us", 1), ("ms", 1000)):
        if us < 1000 * per_unit:
            return f"{us / per_unit:g} {unit}"
    return f"{us / 1_000_000:g} s"


def size(size_bytes: float) -> str:
    """``512.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def counted(number: int, thing: str) -> str:
    """``1 page``, ``2 pages``."""
    return f"{number:,} {thing}{'' if number == 1 else 'es' if thing.endswith('s') else 's'}"


def latencies(figures: dict[str, float]) -> str:
    """All percentiles on one line."""
    return ", ".join(f"{name} {microseconds(figures[key])}" for key, name in LATENCY_NAMES.items())


def rows_of(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """``(name, value)`` of what a reader wants to know first."""
    setup = figures["setup"]
    loop = f"open loop, {setup['arrivals']} arrivals" if figures["open_loop"] else "closed loop"
    yield "page server", f"{setup['target']}, {size(setup['memory_bytes'])} {'+'.join(setup['backing'])}"
    yield (
        "load",
        f"{loop}; {setup['pattern']}; {counted(setup['vcpus'], 'vCPU')}, "
        f"{counted(setup['connections'], 'connection')} over {'+'.join(setup['carrier'])}, "
        f"{counted(setup['processes'], 'process')}",
    )
    if figures["open_loop"]:
        yield "offered", f"{figures['offered_pages_s']:,.0f} faults/s"
    yield (
        "served",
        f"{figures['rate_pages_s']:,.0f} pages/s, {size(figures['rate_bytes_s'])}/s; {figures['pages']:,} pages for "
        f"{figures['faults']:,} faults in {figures['elapsed_s']:.1f} s",
    )
    yield "latency", latencies(figures["latency_us"])
    if figures["open_loop"]:
        yield "since issued", latencies(figures["service_us"])
        yield "issued late by", latencies(figures["issue_delay_us"])
        if figures["unfinished"]:
            yield "fell behind", f"{figures['unfinished']:,} faults were due but not issued before the end"
        elif figures["issue_delay_us"]["p99"] > OWN_DELAY_SHARE_MAX * figures["latency_us"]["p99"]:
            yield "take care", "much of the latency is the load generator's own: it needs more CPU, or more --processes"
    if figures["writes"]:
        yield "writes", f"{figures['writes']:,} of the faults"
    if figures["background"]:
        beside = figures["background"]
        yield "background", f"{size(beside['rate_bytes_s'])}/s beside, {beside['pages']:,} pages"
    yield "errors", _errors(figures)
    yield "verification", _verification(figures)
    yield "ended because", figures["ended_by"]
    if figures["slo"] is not None:
        yield from _slo_rows(figures["slo"])


def _errors(figures: dict[str, Any]) -> str:
    why = ", ".join(f"{count} answers {name}" for name, count in figures["refusals"].items())
    again = figures["asked_again_pages"]
    return f"{figures['errors']:,}" + (f" ({why})" if why else "") + (f"; {again:,} asked again" if again else "")


def _verification(figures: dict[str, Any]) -> str:
    wrong = figures["verification_errors"]
    if figures["verified_by"] == "seed":
        return f"{figures['verified_pages']:,} pages compared with the seed, {wrong:,} wrong"
    return f"every answer's checksum compared, {wrong:,} wrong"


def _slo_rows(slo: dict[str, Any]) -> Iterator[tuple[str, str]]:
    bounds = ", ".join(f"{item['figure']} <= {short_time(item['bound_us'])}" for item in slo["objectives"])
    if "steps" not in slo:
        yield "objective", f"{bounds}: " + ("holds" if slo["holds"] else "BROKEN: " + "; ".join(slo["broken"]))
        return
    highest = slo["rate_pages_s"]
    found = f"holds up to {highest:,.0f} pages/s" if highest else "holds at none of the rates tried"
    yield "objective", f"{bounds}: {found} ({len(slo['steps'])} measurements)"


def text_of(figures: dict[str, Any]) -> str:
    """The whole result, a line a fact."""
    lines = [f"{name:<16}{value}" for name, value in rows_of(figures)]
    for problem in figures["problems"]:
        lines.append(f"  {problem}")
    if (figures["slo"] or {}).get("steps"):
        lines.append("")
        lines.append(f"{'offered/s':>12}{'served/s':>12}{'p50':>12}{'p99':>12}{'max':>12}")
        for step in figures["slo"]["steps"]:
            latency = step["latency_us"]
            shown = "".join(f"{microseconds(latency[name]):>12}" for name in ("p50", "p99", "max"))
            verdict = "" if step["holds"] else "  broken"
            lines.append(f"{step['offered_pages_s']:>12,.0f}{step['rate_pages_s']:>12,.0f}{shown}{verdict}")
    if figures.get("compare"):
        lines += ["", "compared with the earlier run (now / earlier)"]
        for name, ratio in figures["compare"]["ratios"].items():
            lines.append(f"  {name:<20}{f'{ratio:.2f}x' if ratio is not None else 'earlier was 0':>14}")
        for name, (old, new) in figures["compare"]["differences"].items():
            lines.append(f"  not alike: {name} was {old}, is {new}")
    return "\n".join(lines)
