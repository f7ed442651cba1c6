"""The charts of a report, each from a timeline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from farfault_client.load.plot import Axis, Series, chart, linear_axis
from farfault_client.load.text import short_time
from farfault_client.receive.histogram import bucket_edge_us
from farfault_client.report.heat import SHADES, Cell, Tick, heat
from farfault_client.report.timeline import Timeline

BUCKETS_PER_ROW = 8
"""A quarter of an octave."""
BUCKETS_PER_OCTAVE = 32
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
VCPU_LINES_MAX = 3
"""More vCPUs than these are drawn as rows, not as lines."""


def charts_of(timeline: Timeline, guest_bytes: int, page_bytes: int) -> list[str]:
    """All charts, in the order in which they are read."""
    x = _time_axis(timeline)
    return [
        latency_over_time(timeline, x),
        latency_histogram(timeline),
        map_over_time(timeline, x, guest_bytes),
        progress(timeline, x, page_bytes),
        lanes(timeline, x),
        fault_rate(timeline, x),
        blocked(timeline, x),
        waiting(timeline, x),
    ]


def latency_over_time(timeline: Timeline, x: Axis) -> str:
    """Each fault at the moment when it ended."""
    rows = [_rows(latency) for latency in timeline.latency]
    lowest, highest = _span(rows)
    count = highest - lowest + 1
    most = max((found for row in rows for found in row.values()), default=1)
    cells = (
        Cell(index / timeline.bins, (highest - row) / count, 1 / timeline.bins, 1 / count, _shade(found, most))
        for index, counted in enumerate(rows)
        for row, found in counted.items()
    )
    ticks = [Tick((highest + 1 - row) / count, _edge(row)) for row in _round_rows(lowest, highest)]
    legend = ("1 fault", f"{most:,} faults" if most > 1 else "1 fault")
    return heat("Faults by time and latency", cells, x, ticks, style="a", legend=legend, x_name="time")


def latency_histogram(timeline: Timeline) -> str:
    """All faults by latency."""
    total: Counter[int] = sum((_rows(latency) for latency in timeline.latency), Counter())
    lowest, highest = _span([total])
    count = highest - lowest + 1
    axis = Axis(
        lowest,
        highest + 1,
        _round_rows(lowest, highest, ticks_max=5),
        lambda row: _edge(int(row)),
    )
    y = linear_axis(0.0, float(max(total.values(), default=1)), lambda value: f"{value:,.0f}")
    cells = (
        Cell((row - lowest) / count, 1 - y.position(found), 0.92 / count, y.position(found), SHADES)
        for row, found in total.items()
    )
    ticks = [Tick(1 - y.position(tick), y.label(tick)) for tick in y.ticks]
    return heat("Faults by latency", cells, axis, ticks, style="a", legend=None, x_name="waited")


def map_over_time(timeline: Timeline, x: Axis, guest_bytes: int) -> str:
    """Guest memory from the lowest address at the top, as it fills."""
    cells = (cell for index, text in enumerate(timeline.maps) if text for cell in _map_column(timeline, index, text))
    power = _power(guest_bytes)
    ticks = [Tick(share, f"{share * guest_bytes / 1024.0**power:.4g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    title = f"Memory map over time, {UNITS[power]}"
    return heat(title, cells, x, ticks, style="good", legend=("empty", "all there"), x_name="time")


def progress(timeline: Timeline, x: Axis, page_bytes: int) -> str:
    """Bytes that are there."""
    points = [(timeline.middle_s(index), float(count * page_bytes)) for index, count in enumerate(timeline.settled)]
    y, unit = _bytes_axis([points])
    return chart(
        f"Memory that is there, {unit}", x, y, [Series("installed, zero or removed", points, "a")], x_name="time"
    )


def lanes(timeline: Timeline, x: Axis) -> str:
    """Throughput of each lane."""
    series = [
        Series(name, [(timeline.middle_s(index), value / timeline.bin_s) for index, value in enumerate(values)], style)
        for (name, values), style in zip(timeline.bytes.items(), "abc", strict=False)
    ]
    y, unit = _bytes_axis([list(line.points) for line in series])
    return chart(f"Lanes, {unit}/s", x, y, series, x_name="time")


def fault_rate(timeline: Timeline, x: Axis) -> str:
    """Faults a second."""
    points = [(timeline.middle_s(index), count / timeline.bin_s) for index, count in enumerate(timeline.faults)]
    y = linear_axis(0.0, max((value for _, value in points), default=0.0) or 1.0, lambda value: f"{value:,.0f}")
    return chart("Demand faults a second", x, y, [Series("faults/s", points, "a")], x_name="time")


def blocked(timeline: Timeline, x: Axis) -> str:
    """Which share of its time each vCPU waited."""
    shares = {
        vcpu: [min(1.0, seconds / timeline.bin_s) for seconds in values]
        for vcpu, values in sorted(timeline.blocked_s.items(), key=lambda item: int(item[0]))
    }
    title = "Share of time that each vCPU waited"
    if len(shares) > VCPU_LINES_MAX:
        return _blocked_rows(title, timeline, x, shares)
    series = [
        Series(f"vCPU {vcpu}", [(timeline.middle_s(index), share) for index, share in enumerate(values)], style)
        for (vcpu, values), style in zip(shares.items(), "abc", strict=False)
    ]
    y = Axis(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0], lambda share: f"{share:.0%}")
    return chart(title, x, y, series, x_name="time")


def waiting(timeline: Timeline, x: Axis) -> str:
    """How many threads wait for a page at the same time."""
    points = [(timeline.middle_s(index), float(count)) for index, count in enumerate(timeline.waiting)]
    y = linear_axis(0.0, max(timeline.waiting) or 1.0, lambda value: f"{value:g}")
    return chart("Threads that wait", x, y, [Series("most in each moment", points, "a")], x_name="time")


def _blocked_rows(title: str, timeline: Timeline, x: Axis, shares: dict[str, list[float]]) -> str:
    count = len(shares)
    cells = (
        Cell(index / timeline.bins, row / count, 1 / timeline.bins, 0.9 / count, math.ceil(share * SHADES))
        for row, values in enumerate(shares.values())
        for index, share in enumerate(values)
        if share > 0
    )
    step = math.ceil(count / 16)
    ticks = [Tick((row + 0.5) / count, f"vCPU {vcpu}") for row, vcpu in enumerate(shares) if row % step == 0]
    return heat(title, cells, x, ticks, style="b", legend=("0 %", "100 %"), x_name="time")


def _map_column(timeline: Timeline, index: int, text: str) -> Iterator[Cell]:
    """Runs of equal cells, as one rectangle each."""
    first = 0
    for place in range(1, len(text) + 1):
        if place < len(text) and text[place] == text[first]:
            continue
        shade = int(text[first])
        if shade:
            top, height = first / len(text), (place - first) / len(text)
            yield Cell(index / timeline.bins, top, 1 / timeline.bins, height, shade)
        first = place


def _rows(latency: Counter[int]) -> Counter[int]:
    rows: Counter[int] = Counter()
    for bucket, count in latency.items():
        rows[bucket // BUCKETS_PER_ROW] += count
    return rows


def _span(rows: list[Counter[int]]) -> tuple[int, int]:
    """The lowest and the highest row in use, widened to whole octaves."""
    used = [row for counted in rows for row in counted] or [BUCKETS_PER_OCTAVE // BUCKETS_PER_ROW * 6]
    per_octave = BUCKETS_PER_OCTAVE // BUCKETS_PER_ROW
    return min(used) // per_octave * per_octave, (max(used) // per_octave + 1) * per_octave - 1


def _round_rows(lowest: int, highest: int, ticks_max: int = 8) -> list[int]:
    """Rows that begin an octave, or every second, third ... of these."""
    per_octave = BUCKETS_PER_OCTAVE // BUCKETS_PER_ROW
    octaves = list(range(lowest, highest + 1, per_octave))
    return octaves[:: math.ceil(len(octaves) / ticks_max)]


def _shade(count: int, most: int) -> int:
    """Logarithmic, so that single faults are seen beside thousands."""
    if most <= 1:
        return SHADES
    return 2 + round((SHADES - 2) * math.log(count) / math.log(most))


def _time_axis(timeline: Timeline) -> Axis:
    ticks = [tick for tick in linear_axis(0.0, timeline.end_s, str).ticks if tick <= timeline.end_s * 1.0001]
    return Axis(0.0, timeline.end_s, ticks, lambda seconds: short_time(seconds * 1e6) if seconds else "0")


def _bytes_axis(lines: list[list[tuple[float, float]]]) -> tuple[Axis, str]:
    """An axis labelled in one unit, and that unit."""
    highest = max((value for points in lines for _, value in points), default=0.0) or 1.0
    power = _power(highest)
    scale = 1024.0**power
    rough = linear_axis(0.0, highest / scale, str)
    axis = Axis(0.0, rough.high * scale, [tick * scale for tick in rough.ticks], lambda value: f"{value / scale:g}")
    return axis, UNITS[power]


def _power(size_bytes: float) -> int:
    """Index of the unit in which a size is written."""
    return min(len(UNITS) - 1, int(math.log(size_bytes, 1024))) if size_bytes >= 1 else 0


def _edge(row: int) -> str:
    """Where a row of latencies begins, in two or three digits: 256 us, 16 ms."""
    us = bucket_edge_us(row * BUCKETS_PER_ROW - 1)
    in_unit = us / 1000 ** int(math.log(us, 1000)) if us >= 1 else us
    return short_time(float(f"{us:.3g}" if in_unit >= 100 else f"{us:.2g}"))
