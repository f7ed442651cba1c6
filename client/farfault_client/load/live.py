"""The live table of a running load test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from farfault_client.load.text import microseconds

if TYPE_CHECKING:
    from farfault_client.load.measurement import Measurement

ROWS_SHOWN = 12
REFRESHES_PER_S = 4

Show = Callable[["Measurement", str], None]


@contextmanager
def live_table(*, enabled: bool) -> Iterator[Show]:
    """Gives a function that shows a measurement under a title; it does nothing where standard error is no terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield lambda measurement, title: None
        return

    def table_of(measurement: Measurement, title: str) -> Table:
        table = Table(title=title, title_justify="left")
        for name in ("time", "due/s", "pages/s", "p50", "p90", "p99", "max", "errors"):
            table.add_column(name, justify="right")
        for point in measurement.points(ROWS_SHOWN):
            times = (microseconds(point[name]) for name in ("p50_us", "p90_us", "p99_us", "max_us"))
            style = "red" if point["errors"] else ""
            table.add_row(
                f"{point['t_s']:.0f} s",
                f"{point['offered_pages_s']:,.0f}",
                f"{point['rate_pages_s']:,.0f}",
                *times,
                f"{point['errors']:,}",
                style=style,
            )
        return table

    with Live(console=console, refresh_per_second=REFRESHES_PER_S, transient=True) as live:
        yield lambda measurement, title: live.update(table_of(measurement, title))
