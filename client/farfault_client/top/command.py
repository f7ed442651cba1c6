"""The command ``farfault top``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import click
from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import UnreachableError

from farfault_client.migrate.follow import ReceiverClient
from farfault_client.options import FILE
from farfault_client.top.figures import Figures, figures_of

MAP_CELLS: Final = 512
"""Asked for of the receiver, whatever the size of the terminal: it pays for each."""


@click.command(short_help="Watch a move in the terminal.")
@click.option("--control", type=FILE, required=True, help="Control socket of the `farfault receive` to watch.")
@click.option(
    "--interval",
    type=click.FloatRange(0.05, 60),
    default=0.5,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option("--once", is_flag=True, help="Show one frame and end; rates are over one interval.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of a screen.")
def top(control: Path, interval: float, once: bool, as_json: bool) -> None:
    """Watch a move in the terminal: the memory map filling, faults, lanes, and which vCPU waits for what.

    It only watches: leaving it does not touch the move. It ends when the move ends.

    \b
      farfault top --control /run/ff.ctl
      ssh destination -t farfault top --control /run/ff.ctl
      farfault top --control /run/ff.ctl --once --json | jq .vcpus
      watch -n 5 farfault top --control /run/ff.ctl --once
    """
    if not control.exists():
        raise UnreachableError(
            f"there is no control socket {control}", "name the one that `farfault receive --control` was given"
        )
    try:
        asyncio.run(_watch(control, interval, once=once, as_json=as_json))
    except KeyboardInterrupt:
        return


async def _watch(control: Path, interval_s: float, *, once: bool, as_json: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from farfault_client.top.screen import screen

    console = Console()
    if as_json:
        async for figures in looks(control, interval_s, once=once):
            click.echo(json.dumps(figures.to_json()))
    elif once or not console.is_terminal:
        async for figures in looks(control, interval_s, once=once):
            console.print(screen(figures, console, str(control), live=False))
    else:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            async for figures in looks(control, interval_s):
                live.update(screen(figures, console, str(control)), refresh=True)
        console.print(screen(figures, console, str(control), live=False))


async def looks(control: Path, interval_s: float, *, once: bool = False) -> AsyncIterator[Figures]:
    """What the receiver says, about each `interval_s`, and at the end of the move.

    Args:
        once: end after the first look that has rates.
    """
    before, looked_at = None, 0.0
    async with ReceiverClient(control) as receiver:
        async for status in receiver.watch(int(interval_s * 1000), MAP_CELLS):
            now = time.monotonic()
            has_ended = status.phase in (rpb.PHASE_DONE, rpb.PHASE_FAILED)
            if before is not None and now - looked_at < interval_s / 2 and not has_ended:
                continue  # something has changed in between; the next regular look shows it
            if before is not None or has_ended or not once:
                yield figures_of(status, before, now - looked_at)
                if once:
                    return
            before, looked_at = status, now
