"""Line charts as inline SVG. Colours and fonts come from the page's style sheet, so that they follow its theme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 76, 26, 14, 60
DOTS_MAX = 60
"""A line of more points is drawn without dots."""

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Axis:
    """One direction of a chart.

    Attributes:
        low, high: what it spans, `low` < `high`; above 0 where logarithmic.
        ticks: where it is labelled.
        label: of a tick.
        is_log: logarithmic.
    """

    low: float
    high: float
    ticks: Sequence[float]
    label: Format
    is_log: bool = False

    def position(self, value: float) -> float:
        """0 at `low`, 1 at `high`; clipped."""
        if self.is_log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


@dataclass(frozen=True, slots=True)
class Series:
    """One line, or points without a line.

    Attributes:
        name: in the legend.
        points: ``(x, y)``.
        style: a class of the style sheet: ``a``, ``b``, ``c`` or ``bad``.
        is_dashed: for what was asked rather than measured.
        has_line: False: dots only.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str
    is_dashed: bool = False
    has_line: bool = True


def linear_axis(low: float, high: float, label: Format, ticks: int = 5) -> Axis:
    """Round ticks from `low` to at least `high`."""
    span = max(high - low, 1e-9)
    raw = span / ticks
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    count = math.ceil(span / step - 1e-9)
    return Axis(low, low + count * step, [low + index * step for index in range(count + 1)], label)


def log_axis(values: Iterable[float], label: Format, ticks_max: int = 6) -> Axis:
    """Ticks at 1, 2, 5 times the powers of ten, or at the powers only, around all values above 0."""
    positive = [value for value in values if value > 0] or [1.0]
    marks = [factor * 10.0**power for power in range(-3, 13) for factor in (1, 2, 5)]
    low = max((mark for mark in marks if mark <= min(positive) * 1.0001), default=marks[0])
    high = min((mark for mark in marks if mark >= max(positive) * 0.9999 and mark > low), default=marks[-1])
    ticks = [mark for mark in marks if low <= mark <= high]
    if len(ticks) > ticks_max:
        decades = [mark for mark in ticks if math.isclose(math.log10(mark) % 1, 0, abs_tol=1e-6)]
        ticks = decades if len(decades) > 1 else ticks[:: math.ceil(len(ticks) / ticks_max)]
    return Axis(low, high, ticks, label, is_log=True)


def chart(title: str, x: Axis, y: Axis, series: Sequence[Series], *, x_name: str, limit: float | None = None) -> str:
    """A figure with its title, the chart and a legend.

    Args:
        title: above it; also what a screen reader says.
        x, y: the axes.
        series: lines, drawn in this order.
        x_name: below the x axis.
        limit: a horizontal line there.
    """
    body = [
        *_grid(x, y),
        f'<text class="name" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}">{escape(x_name)}</text>',
    ]
    if limit is not None:
        height = _y(y, limit)
        body.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
    for line in series:
        body += _draw(line, x, y)
    legend = "".join(
        f'<span><i class="{line.style} {_shape(line)}"></i>{escape(line.name)}</span>' for line in series if line.points
    )
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def _shape(line: Series) -> str:
    return "dots" if not line.has_line else "dashed" if line.is_dashed else "solid"


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.position(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.position(value) * (HEIGHT - TOP - BOTTOM)


def _grid(x: Axis, y: Axis) -> list[str]:
    marks = []
    for tick in y.ticks:
        height = _y(y, tick)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        marks.append(f'<text class="y" x="{LEFT - 8}" y="{height + 5:.1f}">{escape(y.label(tick))}</text>')
    for tick in x.ticks:
        across, floor = _x(x, tick), HEIGHT - BOTTOM
        marks.append(f'<line class="tick" x1="{across:.1f}" x2="{across:.1f}" y1="{floor}" y2="{floor + 4}"/>')
        marks.append(f'<text class="x" x="{across:.1f}" y="{floor + 22}">{escape(x.label(tick))}</text>')
    return marks


def _draw(line: Series, x: Axis, y: Axis) -> list[str]:
    drawn = []
    places = [(_x(x, across), _y(y, up)) for across, up in line.points]
    if line.has_line and len(places) > 1:
        path = " ".join(f"{across:.1f},{up:.1f}" for across, up in places)
        drawn.append(f'<polyline class="line {line.style}{" dashed" if line.is_dashed else ""}" points="{path}"/>')
    if len(places) <= DOTS_MAX and not line.is_dashed:
        for (across, up), (left, right) in zip(places, line.points, strict=True):
            tip = escape(f"{line.name}: {x.label(left)}, {y.label(right)}")
            drawn.append(
                f'<circle class="dot {line.style}" cx="{across:.1f}" cy="{up:.1f}" r="3"><title>{tip}</title></circle>'
            )
    return drawn
