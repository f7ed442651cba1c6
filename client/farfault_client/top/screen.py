"""The screen of `farfault top`: lines that fit a terminal of any size, from 40 columns and 12 lines on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.text import Text

from farfault_client.load.text import counted, microseconds, size
from farfault_client.migrate.follow import PHASES
from farfault_client.top.figures import Figures, LaneFigures, VcpuFigures
from farfault_client.top.map import GLYPHS, INSTALLED, resample

MAP_LINES_MIN: Final = 1
MAP_LINES_MAX: Final = 24
VCPU_LINES_MIN: Final = 2
WIDE_COLUMNS: Final = 120
"""From here on lanes stand beside faults."""


def screen(figures: Figures, console: Console, target: str, *, live: bool = True) -> RenderableType:
    """One frame.

    Args:
        figures: what to show.
        console: for its size and what it can print.
        target: what is watched, for the title.
        live: False: no line that says how to leave.
    """
    width, height = console.width, console.height
    is_ascii = "utf" not in console.encoding.lower()
    head = [_title(figures, target, width), _bar(figures, width, is_ascii)]
    if figures.status.error:
        head.append(Text(figures.status.error, style="bold red"))
    middle = _middle(figures, width)
    foot = [_clip(Text("Ctrl-C ends this view, never the move", style="dim"), width)] if live else []
    # What is left over goes to the map and the vCPUs; the map has the first claim to the space.
    left = max(0, height - len(head) - len(middle) - len(foot) - 4)
    vcpu_lines = min(len(figures.vcpus), max(VCPU_LINES_MIN, left // 3))
    map_lines = max(MAP_LINES_MIN, min(MAP_LINES_MAX, left - vcpu_lines))
    return Group(
        *head,
        *_map(figures, width, map_lines, is_ascii),
        *middle,
        *_vcpus(figures, width, vcpu_lines),
        *foot,
    )


def _title(figures: Figures, target: str, width: int) -> Text:
    status = figures.status
    phase = PHASES.get(status.phase, "unknown")
    text = Text.assemble(("farfault top ", "bold"), (phase, "bold green" if phase != "failed" else "bold red"))
    if status.fault_source:
        text.append(f"  {status.fault_source}")
    if not status.connected and phase not in ("done", "failed"):
        text.append("  page server out of reach: faults wait", style="bold red")
    if cell_len(text.plain) + len(target) + 2 <= width:
        text.append(" " * (width - cell_len(text.plain) - len(target)) + target, style="dim")
    return _clip(text, width)


def _bar(figures: Figures, width: int, is_ascii: bool) -> Text:
    status = figures.status
    page = status.page_size_bytes
    eta = f"ETA {status.eta_s:.1f} s" if status.eta_s and figures.progress < 1 else f"{status.postcopy_s:.1f} s"
    words = f" {figures.progress:6.1%} of {size(status.guest_pages * page)}  {size(figures.moved_bytes_per_s)}/s  {eta}"
    room = max(5, width - len(words))
    filled = int(room * figures.progress)
    full, empty = ("#", "-") if is_ascii else ("━", "─")
    return _clip(Text.assemble((full * filled, "green"), (empty * (room - filled), "dim"), words), width)


def _map(figures: Figures, width: int, lines: int, is_ascii: bool) -> Iterator[Text]:
    cells = resample(figures.status.map, width * lines)
    for line in range(lines):
        text = Text()
        for cell in cells[line * width : (line + 1) * width]:
            glyph = GLYPHS.get(cell, GLYPHS[INSTALLED])
            text.append(glyph.ascii if is_ascii else glyph.text, style=glyph.style)
        yield text
    legend = Text()
    for glyph in GLYPHS.values():
        legend.append(f"{glyph.ascii if is_ascii else glyph.text} ", style=glyph.style)
        legend.append(f"{glyph.meaning}  ", style="dim")
    share = figures.status.guest_pages * figures.status.page_size_bytes / max(1, width * lines)
    legend.append(f"{size(share)} a cell", style="dim")
    yield _clip(legend, width)


def _middle(figures: Figures, width: int) -> list[Text]:
    """Faults and lanes, side by side where there is room."""
    faults, lanes = list(_faults(figures)), list(_lanes(figures))
    if width < WIDE_COLUMNS:
        return [_clip(line, width) for line in (*faults, *lanes)]
    half = width // 2
    lines = []
    for index in range(max(len(faults), len(lanes))):
        left = faults[index] if index < len(faults) else Text()
        right = lanes[index] if index < len(lanes) else Text()
        line = _clip(left, half - 2)
        line.append(" " * (half - cell_len(line.plain)))
        lines.append(_clip(line + right, width))
    return lines


def _faults(figures: Figures) -> Iterator[Text]:
    status, latency = figures.status, figures.status.fault_latency
    line = Text.assemble(("faults      ", "bold"), f"{figures.faults_per_s:,.0f}/s, {status.demand_faults:,} in all")
    sources = ", ".join(f"{count:,} {name}" for name, count in sorted(status.faults_by_source.items()))
    if sources:
        line.append(f"  ({sources})", style="dim")
    yield line
    yield Text.assemble(
        ("latency     ", "bold"),
        f"p50 {microseconds(latency.p50_us)}, p90 {microseconds(latency.p90_us)}, "
        f"p99 {microseconds(latency.p99_us)}, max {microseconds(latency.max_us)}",
    )
    waiting, slow = status.counters["waiting"], status.counters["slow_faults"]
    line = Text.assemble(("waiting     ", "bold"), counted(waiting, "thread"))
    if waiting:
        line.append(f", the longest for {microseconds(status.longest_wait_s * 1e6)}")
    line.append(f"; slow faults {slow}", style="bold red" if slow else "")
    yield line


def _lanes(figures: Figures) -> Iterator[Text]:
    for lane in figures.lanes:
        yield _lane(lane, figures)


def _lane(lane: LaneFigures, figures: Figures) -> Text:
    line = Text.assemble((f"{lane.name:<11} ", "bold"))
    line.append(f"{lane.carrier or 'down':<8}", style="" if lane.carrier else "bold red")
    line.append(f"{size(lane.bytes_per_s):>10}/s  {size(lane.bytes):>10}")
    if lane.name == "background":
        status = figures.status
        cap = f"cap {size(status.background_bytes_per_s)}/s" if status.background_bytes_per_s else "no cap"
        line.append(f"  {cap}, window {size(status.counters['background_window_bytes'])}", style="dim")
    if lane.reconnects or lane.bad_answers:
        line.append(f"  {lane.reconnects} reconnects, {lane.bad_answers} bad answers", style="yellow")
    return line


def _vcpus(figures: Figures, width: int, lines: int) -> Iterator[Text]:
    """Those that wait longest, then those that have waited most, as far as there is room."""
    if not figures.vcpus:
        yield Text("vCPUs       their waits are not known for this fault source", style="dim")
        return
    yield _clip(Text(f"{'vCPU':>4} {'waited':>9} {'now':>5} {'exits':>9}  waits for", style="bold"), width)
    order = sorted(figures.vcpus, key=lambda vcpu: (-vcpu.waiting_s, -vcpu.blocked_share, vcpu.vcpu))
    shown = order[:lines] if len(order) <= lines else order[: lines - 1]
    for vcpu in sorted(shown, key=lambda vcpu: vcpu.vcpu):
        yield _clip(_vcpu(vcpu), width)
    if len(order) > len(shown):
        yield Text(f"{'':>4} and {len(order) - len(shown)} that wait less", style="dim")


def _vcpu(vcpu: VcpuFigures) -> Text:
    line = Text(f"{vcpu.vcpu:>4} {vcpu.blocked_s:>7.2f} s {vcpu.blocked_share:>5.0%} {vcpu.exits:>9,}  ")
    if vcpu.waiting_s:
        style = "bold red" if vcpu.waiting_s > 1 else "yellow"
        line.append(f"page {vcpu.waiting_page:#x} for {microseconds(vcpu.waiting_s * 1e6)}", style=style)
    return line


def _clip(text: Text, width: int) -> Text:
    text.truncate(width, overflow="ellipsis")
    return text
