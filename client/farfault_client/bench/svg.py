"""Small plots as inline SVG. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import floor, log10
from typing import Final, NamedTuple

COLOURS: Final = ("#8c8c8c", "#bdbdbd", "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")
STYLE: Final = "font: 13px system-ui, sans-serif"


class Bar(NamedTuple):
    """One bar: its length is the median of `values`, each of which is a dot on it."""

    label: str
    values: Sequence[float]
    median: float
    text: str


class Line(NamedTuple):
    """One curve through points ``(x, y)``, in order of x."""

    label: str
    points: Sequence[tuple[float, float]]


def bars(title: str, items: Sequence[Bar]) -> str:
    """Horizontal bars from 0."""
    left, width, height, gap = 130, 360, 18, 8
    top = max((max([item.median, *item.values]) for item in items), default=0) or 1.0
    rows = []
    for index, item in enumerate(items):
        y = 28 + index * (height + gap)
        colour = COLOURS[index % len(COLOURS)]
        rows.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{escape(item.label)}</text>')
        length = item.median / top * width
        rows.append(f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{height}" fill="{colour}"/>')
        rows += [
            f'<circle cx="{left + value / top * width:.1f}" cy="{y + height / 2}" r="2.5" fill="#222"/>'
            for value in item.values
        ]
        rows.append(f'<text x="{left + width + 10}" y="{y + 13}">{escape(item.text)}</text>')
    total = 34 + len(items) * (height + gap)
    return _frame(title, left + width + 130, total, rows)


def lines(title: str, x_title: str, curves: Sequence[Line]) -> str:
    """Curves with y from 0 and x as it comes, one tick a point of the first curve."""
    left, top, width, height = 80, 34, 460, 230
    points = [point for curve in curves for point in curve.points]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_high = _round_up(max(y for _, y in points))
    place = lambda x, y: (  # noqa: E731
        left + (x - x_low) / ((x_high - x_low) or 1) * width,
        top + height - y / y_high * height,
    )
    parts = [f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#888"/>']
    for step in range(5):
        value = y_high * step / 4
        _, y = place(x_low, value)
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.6g}</text>')
    for x_value, _ in curves[0].points:
        x, _ = place(x_value, 0)
        parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{x_value:g}</text>')
    parts.append(f'<text x="{left + width}" y="{top + height + 32}" text-anchor="end">{escape(x_title)}</text>')
    for index, curve in enumerate(curves):
        colour = COLOURS[(index + 2) % len(COLOURS)]
        path = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in curve.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        x, y = left + width + 12, top + 14 + 18 * index
        parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{escape(curve.label)}</text>')
    return _frame(title, left + width + 200, top + height + 40, parts)


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page."""
    style = f"body {{ {STYLE}; margin: 2em; max-width: 72em }} table {{ border-collapse: collapse }} "
    style += "td, th { padding: 2px 10px; text-align: right } td:first-child { text-align: left } svg { margin: 8px }"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style>'
    return "\n".join([head, f"<h1>{escape(title)}</h1>", *parts, "</html>\n"])


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def machine_list(machine: dict[str, str], command: str) -> str:
    """The command and where it ran."""
    items = [f"<li>command: <code>{escape(command)}</code></li>"]
    items += [f"<li>{escape(name)}: {escape(value)}</li>" for name, value in machine.items()]
    return f"<ul>{''.join(items)}</ul>"


def _frame(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" style="{STYLE}">'
    return "\n".join([head, f'<text x="8" y="16" font-weight="600">{escape(title)}</text>', *parts, "</svg>"])


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)
