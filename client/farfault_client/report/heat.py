"""Pictures of many small cells as inline SVG: one path for each shade, so that they stay small."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final, NamedTuple

from farfault_client.load.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axis

SHADES: Final = 9
"""Shade 0 is not drawn, shade 9 is full."""


class Cell(NamedTuple):
    """A rectangle: shares of the plot's width and height from its left top corner; `shade` is 1..`SHADES`."""

    left: float
    top: float
    width: float
    height: float
    shade: int


class Tick(NamedTuple):
    """A label on the y axis at a share of the plot's height from the top."""

    at: float
    text: str


def heat(
    title: str,
    cells: Iterable[Cell],
    x: Axis,
    ticks: Sequence[Tick],
    *,
    style: str,
    legend: tuple[str, str] | None,
    x_name: str,
) -> str:
    """A figure.

    Args:
        title: above it; also what a screen reader says.
        cells: drawn side by side.
        x: what the width spans.
        ticks: of the y axis.
        style: colour class: ``a``, ``b``, ``c``.
        legend: what the palest and the fullest shade mean; None: there is one shade.
        x_name: below the x axis.
    """
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    paths: dict[int, list[str]] = defaultdict(list)
    for cell in cells:
        left, top = LEFT + cell.left * wide, TOP + cell.top * high
        paths[cell.shade].append(
            f"M{left:.1f} {top:.1f}h{cell.width * wide:.1f}v{cell.height * high:.1f}h-{cell.width * wide:.1f}z"
        )
    body = [_frame(), *_x_axis(x, x_name), *_y_axis(ticks)]
    body += [
        f'<path class="cell {style}" fill-opacity="{shade / SHADES:.2f}" d="{"".join(parts)}"/>'
        for shade, parts in sorted(paths.items())
    ]
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
        f"{_legend(legend, style)}</figure>"
    )


def _legend(legend: tuple[str, str] | None, style: str) -> str:
    if legend is None:
        return ""
    swatches = "".join(
        f'<i class="shade {style}" style="opacity:{shade / SHADES:.2f}"></i>' for shade in (1, 3, 5, 7, 9)
    )
    return f'<div class="legend"><span>{escape(legend[0])} {swatches} {escape(legend[1])}</span></div>'


def _frame() -> str:
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{wide}" height="{high}"/>'


def _x_axis(x: Axis, name: str) -> list[str]:
    floor = HEIGHT - BOTTOM
    marks = [f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">{escape(name)}</text>']
    for tick in x.ticks:
        across = LEFT + x.position(tick) * (WIDTH - LEFT - RIGHT)
        marks.append(f'<line class="tick" x1="{across:.1f}" x2="{across:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        marks.append(f'<text class="x" x="{across:.1f}" y="{floor + 22}">{escape(x.label(tick))}</text>')
    return marks


def _y_axis(ticks: Sequence[Tick]) -> list[str]:
    high = HEIGHT - TOP - BOTTOM
    return [
        f'<text class="y" x="{LEFT - 8}" y="{TOP + tick.at * high + 5:.1f}">{escape(tick.text)}</text>'
        for tick in ticks
    ]
