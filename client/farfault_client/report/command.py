"""The command ``farfault report``."""

from __future__ import annotations

from pathlib import Path

import click
from farfault_cli.errors import UsageError


@click.command(short_help="Turn the record of a move into one HTML page.")
@click.argument("record", type=click.Path(path_type=Path))
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="HTML file to write.  [default: RECORD with .html]"
)
def report(record: Path, output: Path | None) -> None:
    """Turn the record of a move into one HTML page.

    The record is what `farfault receive --record FILE` keeps. The page needs nothing else: no script, no network; it
    can be mailed or kept with a ticket. A record that breaks off (the receiver was killed) gives a page too.

    \b
      farfault receive --record move.jsonl ...
      farfault report move.jsonl -o move.html
    """
    target = output or record.with_suffix(".html")
    click.echo(f"wrote {target}, {write_report(record, target) >> 10} KiB")


def write_report(record: Path, target: Path) -> int:
    """Writes the page of a record; returns its length in bytes.

    Raises:
        UsageError: the record cannot be read or is none, or the page cannot be written.
    """
    from farfault_client.report.page import page_of
    from farfault_client.report.reading import read_record

    page = page_of(read_record(record)).encode()
    try:
        return target.write_bytes(page)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}", "name another file with --output") from error
