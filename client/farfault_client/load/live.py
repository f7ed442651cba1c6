"""How a running load test is shown: a live table on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from farfault_client.load.text import microseconds

if TYPE_CHECKING:
    from farfault_client.load.measurement import Measurement

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0
ROWS_SHOWN = 12
REFRESHES_PER_S = 4

Show = Callable[["Measurement", str], None]


def progress_log() -> Show:
    """A function that logs a measurement's first figures, and then at most one line in `LOG_INTERVAL_S`."""
    title_logged, logged_at = "", 0.0

    def show(measurement: Measurement, title: str) -> None:
        nonlocal title_logged, logged_at
        now = time.monotonic()
        if title == title_logged and now - logged_at < LOG_INTERVAL_S:
            return
        title_logged, logged_at = title, now
        newest = measurement.points(1)[-1]
        rate, p99 = newest["rate_pages_s"], microseconds(newest["p99_us"])
        logger.info("%s: %s pages/s, p99 %s, %d errors", title, f"{rate:,.0f}", p99, newest["errors"])

    return show


@contextmanager
def live_table(*, enabled: bool) -> Iterator[Show]:
    """Gives a function that shows a measurement under a title; it logs where not enabled or there is no terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    console = Console(stderr=True)
    if not enabled or not console.is_terminal:
        yield progress_log()
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
