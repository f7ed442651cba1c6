"""The command ``farfault bench micro``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

import click

from farfault_client.bench.document import machine_text, markdown_table, replace_section
from farfault_client.bench.machine import command_line, describe_machine
from farfault_client.bench.micro.bench_host import BenchHost
from farfault_client.bench.micro.cases import CASES, PAIRS, Case, Pair
from farfault_client.bench.spread import Spread, spread_of
from farfault_client.options import FILE

GROUPS: Final = tuple(dict.fromkeys(case.group for case in CASES))
HEADINGS: Final = ["", "ours", "limit", "ratio"]
Measured = dict[tuple[str, str], list[dict[str, float]]]


@click.command()
@click.option("--only", "groups", type=click.Choice(GROUPS), multiple=True, help="A group of cases. Default: all.")
@click.option("--runs", type=click.IntRange(1, 1000), default=5, show_default=True, help="Of each case.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Renew the section of this command in a document.")
def micro(groups: tuple[str, ...], runs: int, as_json: bool, markdown: Path | None) -> None:
    """Measure single steps of a fault beside the same steps in C.

    One fetch, the background stream, one installation, and the whole fault of 1 and 8 threads. The programs in C are
    compiled at the first run. Everything runs on the same two CPUs, where the scheduler puts it, and in turn: a
    round trip between two CPUs costs several times one within a CPU, so that a ratio to something placed elsewhere says
    nothing.

    \b
      farfault bench micro
      farfault bench micro --only fetch --runs 9
      farfault bench micro --json | jq '.ratios["fetch.express.p50_us"]'

    Exit codes: 0 done, 1 a case failed, 2 wrong use, 3 no C compiler or no sources.
    """
    wanted = groups or GROUPS
    measured: Measured = {}
    with BenchHost() as host:
        for group in wanted:
            _measure(host, [case for case in CASES if case.group == group], runs, measured, quiet=as_json)
    pairs = [pair for pair in PAIRS if pair.group in wanted]
    table = [row for pair in pairs if (row := _row(measured, pair)) is not None]
    machine, command = describe_machine(), command_line(sys.argv[1:])
    if markdown is not None:
        text = (
            f"## Single steps beside C\n\n{machine_text(machine, command)}\n\nMedian and range of {runs} runs, in turn."
        )
        replace_section(markdown, "micro", f"{text}\n\n{markdown_table(HEADINGS, table)}")
    if as_json:
        click.echo(json.dumps(_report(measured, pairs) | {"machine": machine, "command": command}))
    else:
        _print(table)


def _measure(host: BenchHost, cases: list[Case], runs: int, measured: Measured, *, quiet: bool) -> None:
    for number in range(runs):
        for case in cases:
            figures = case.run(host)
            measured.setdefault((case.group, case.name), []).append(figures)
            if not quiet:
                shown = ", ".join(f"{name} {value:,.1f}" for name, value in figures.items())
                click.echo(f"{case.group} {case.name}, run {number + 1}/{runs}: {shown}", err=True)


def _spreads(measured: Measured, pair: Pair) -> tuple[Spread, Spread] | None:
    ours, limit = (
        spread_of(run.get(pair.figure) for run in measured.get((pair.group, name), ()))
        for name in (pair.ours, pair.limit)
    )
    return None if ours is None or limit is None else (ours, limit)


def _row(measured: Measured, pair: Pair) -> list[str] | None:
    spreads = _spreads(measured, pair)
    if spreads is None:
        return None
    ours, limit = spreads
    title = f"{pair.title} ({pair.unit})"
    return [title, _text(ours), _text(limit), f"{ours.median / limit.median:.2f}"]


def _text(spread: Spread) -> str:
    digits = 0 if spread.median >= 100 else 1
    return f"{spread.median:,.{digits}f} {spread.low:,.{digits}f}-{spread.high:,.{digits}f}"


def _report(measured: Measured, pairs: list[Pair]) -> dict[str, Any]:
    """The object that `--json` prints: every run of every case, and a ratio for each comparison."""
    ratios = {}
    for pair in pairs:
        spreads = _spreads(measured, pair)
        if spreads is not None:
            ratios[pair.name] = spreads[0].median / spreads[1].median
    runs = [
        {"group": group, "case": name, **figures} for (group, name), several in measured.items() for figures in several
    ]
    return {"runs": runs, "ratios": ratios}


def _print(table: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Single steps: median and range")
    for index, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="right" if index else "left")
    for row in table:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140).print(shown)
