"""The command ``farfault bench vcpus``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Final

import click
from farfault_cli.errors import PreflightError, VerificationError

from farfault_client.bench import svg
from farfault_client.bench.document import machine_text, markdown_table, replace_section
from farfault_client.bench.machine import command_line, describe_machine
from farfault_client.bench.spread import Spread, spread_of
from farfault_client.bench.vcpus.measure import FaultSource, Rate, Way, measure
from farfault_client.demo.vms import QEMU
from farfault_client.options import FILE

COUNTS_DEFAULT: Final = (1, 2, 4, 8, 16, 32)
Series = tuple[Way, FaultSource]
Rates = dict[tuple[Series, int], list[Rate]]


@click.command()
@click.option("--vcpus", "counts", type=click.IntRange(1, 64), multiple=True, help="May be repeated. Default: 1 to 32.")
@click.option(
    "--way",
    "ways",
    type=click.Choice([way.value for way in Way]),
    multiple=True,
    help="How pages come; may be repeated. Default: all.",
)
@click.option("--runs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Of each case, in turn.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
@click.option("--html", type=FILE, metavar="FILE", help="Write a page with a plot; it needs nothing else.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Renew the section of this command in a document.")
def vcpus(
    counts: tuple[int, ...],
    ways: tuple[str, ...],
    runs: int,
    as_json: bool,
    html: Path | None,
    markdown: Path | None,
) -> None:
    """Measure missed pages a second by number of vCPUs: NOWAIT exits against blocking userfaultfd.

    A guest starts on absent memory, and each vCPU visits its part of it in random order. Pages come from a pager of
    this host that reads a file (local), or from a page server over gRPC or the express lane; nothing is streamed.

    \b
      farfault bench vcpus
      farfault bench vcpus --vcpus 1 --vcpus 8 --way local --runs 5

    Exit codes: 0 done, 1 a case failed, 2 wrong use, 3 no QEMU or no KVM here, 7 a guest found wrong memory.
    """
    if not shutil.which(QEMU) or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise PreflightError("this needs QEMU and /dev/kvm", "install QEMU, or run on a host with KVM")
    numbers = sorted(set(counts)) or list(COUNTS_DEFAULT)
    wanted: list[Series] = [(way, source) for way in Way if not ways or way.value in ways for source in FaultSource]
    rates: Rates = {}
    for number, count, series in product(range(runs), numbers, wanted):
        rate = measure(count, series[1], series[0])
        rates.setdefault((series, count), []).append(rate)
        if not as_json:
            shown = f"{count} vCPUs, {_name(series)}: {rate.pages_per_s:,.0f} pages/s, {rate.errors} errors"
            click.echo(f"run {number + 1}/{runs}: {shown}", err=True)
    machine, command = describe_machine(), command_line(sys.argv[1:])
    headings, rows = ["vCPUs", *map(_name, wanted)], _rows(rates, wanted, numbers)
    if html is not None:
        html.write_text(
            _page(rates, wanted, numbers, [svg.machine_list(machine, command), svg.html_table(headings, rows)])
        )
    if markdown is not None:
        intro = f"Thousand pages a second, median and range of {runs} runs, in turn."
        text = f"## Missed pages a second by number of vCPUs\n\n{machine_text(machine, command)}\n\n{intro}"
        replace_section(markdown, "vcpus", f"{text}\n\n{markdown_table(headings, rows)}")
    if as_json:
        click.echo(json.dumps({"machine": machine, "command": command, "runs": _runs(rates)}))
    else:
        _print(headings, rows)
    errors = sum(rate.errors for several in rates.values() for rate in several)
    if errors:
        raise VerificationError(f"guests found {errors} wrong pages")


def _name(series: Series) -> str:
    return f"{series[0].value}, {series[1].value}"


def _spread(rates: Rates, series: Series, count: int) -> Spread | None:
    return spread_of(rate.pages_per_s / 1e3 for rate in rates.get((series, count), ()))


def _rows(rates: Rates, wanted: list[Series], numbers: list[int]) -> list[list[str]]:
    rows = []
    for count in numbers:
        spreads = [_spread(rates, series, count) for series in wanted]
        cells = [f"{found.median:.1f} {found.low:.1f}-{found.high:.1f}" if found else "-" for found in spreads]
        rows.append([str(count), *cells])
    return rows


def _runs(rates: Rates) -> list[dict[str, object]]:
    return [
        {"way": way.value, "fault_source": source.value, "vcpus": count, **rate._asdict()}
        for ((way, source), count), several in rates.items()
        for rate in several
    ]


def _page(rates: Rates, wanted: list[Series], numbers: list[int], parts: list[str]) -> str:
    curves = []
    for series in wanted:
        spreads = [(count, _spread(rates, series, count)) for count in numbers]
        curves.append(svg.Line(_name(series), [(count, found.median) for count, found in spreads if found]))
    plot = svg.lines("Thousand missed pages a second", "vCPUs", curves)
    return svg.page("Missed pages a second by number of vCPUs", [plot, *parts])


def _print(headings: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Thousand missed pages a second: median and range")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
