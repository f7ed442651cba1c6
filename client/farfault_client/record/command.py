"""The command ``farfault record``."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click
from farfault_cli.errors import FarfaultError

from farfault_client.migrate.follow import ReceiverClient
from farfault_client.options import FILE
from farfault_client.receive.working_set import runs_of, write_hints


@click.command()
@click.option("--control", type=FILE, required=True, help="Control socket of the receiver (`farfault receive`).")
@click.option("--output", "-o", type=FILE, required=True, help="The file to write, for `--hints` of a later move.")
@click.option("--json", "as_json", is_flag=True, help="Print what was recorded as one JSON object.")
def record(control: Path, output: Path, as_json: bool) -> None:
    """Record the working set of a guest while it moves.

    Follows a move until it ends and writes down which pages the guest missed, in order. The next move of the same
    guest, or of a clone of it, fetches them ahead of the rest.

    \b
      farfault record --control /run/ff.ctl -o web.hints
      farfault receive ... --hints web.hints
    """
    pages, page_count = asyncio.run(_record(control, output))
    if as_json:
        click.echo(json.dumps({"pages": pages, "guest_pages": page_count, "output": str(output)}))
    else:
        click.echo(f"{pages:,} pages of {page_count:,} in {output}")


async def _record(control: Path, output: Path) -> tuple[int, int]:
    packed, page_count = b"", 0
    async with ReceiverClient(control) as receiver:
        try:
            async for status in receiver.watch():
                packed, page_count = await receiver.working_set(), status.guest_pages
        except FarfaultError:
            if not packed:
                raise
    return write_hints(output, page_count, runs_of(packed)), page_count
