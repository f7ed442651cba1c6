"""The command ``farfault bench compare``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from farfault_cli.errors import FarfaultError, PreflightError, UsageError, VerificationError
from farfault_cli.sizes import parse_rate, parse_size
from farfault_shim.guest import GuestKind

from farfault_client.bench.compare.network import describe_proxy
from farfault_client.bench.compare.results import Results, headings, ratio_text, rows
from farfault_client.bench.compare.run import Run, play
from farfault_client.bench.compare.scenario import Axes, Link, Mode, Scenario, order_of_modes
from farfault_client.bench.document import replace_section
from farfault_client.bench.machine import command_line, describe_machine
from farfault_client.demo.processes import end_on_sigterm
from farfault_client.demo.vms import QEMU
from farfault_client.netsim.hosts import check_namespaces, two_hosts
from farfault_client.options import FILE

T = TypeVar("T")
RUNS_DEFAULT: Final = 5
QUICK_RUNS: Final = 3
QUICK_RAM_BYTES: Final = 256 << 20
RAM_MIN_BYTES: Final = 32 << 20


class CommaList(click.ParamType[list[Any]]):
    """Values separated by commas."""

    def __init__(self, element: Callable[[str], T], name: str) -> None:
        self._element = element
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        try:
            return [self._element(part.strip()) for part in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.option(
    "--mode",
    "modes",
    type=CommaList(Mode, "modes"),
    default=",".join(mode.value for mode in Mode),
    show_default=True,
    help="Who moves the VM.",
)
@click.option(
    "--guest",
    "guests",
    type=CommaList(GuestKind, "guests"),
    default="random,sequential,zipf,idle",
    show_default=True,
    help="What the guest does: rewrite all pages in either order, some far more often than others, or only 31 a vCPU.",
)
@click.option("--ram", "rams", type=CommaList(parse_size, "sizes"), default="1GiB,128MiB,4GiB", show_default=True)
@click.option("--vcpus", type=CommaList(int, "counts"), default="1,2,4", show_default=True)
@click.option(
    "--rtt-ms",
    "rtts",
    type=CommaList(float, "ms"),
    default="0,1,10",
    show_default=True,
    help="Round-trip time that a proxy between the hosts adds; 0 without --rate: no proxy.",
)
@click.option(
    "--rate",
    "rates",
    type=CommaList(parse_rate, "bytes/s"),
    default="0,125MB/s",
    show_default=True,
    help="Its rate in each direction; 0: no limit.",
)
@click.option(
    "--link",
    "links",
    type=CommaList(Link, "links"),
    help="What joins the hosts: loopback, or two network namespaces with a veth pair (root, iproute2). Without --full "
    "other round-trip times and rates are measured on the last one. Default: loopback,namespaces where that works.",
)
@click.option("--full", is_flag=True, help="Every combination. Default: change one thing at a time.")
@click.option(
    "--runs",
    type=click.IntRange(1, 1000),
    default=RUNS_DEFAULT,
    show_default=True,
    help="Of each mode in each scenario.",
)
@click.option(
    "--quick",
    is_flag=True,
    help=f"The reference scenario with {QUICK_RAM_BYTES >> 20} MiB, {QUICK_RUNS} runs: under two minutes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
@click.option("--html", type=FILE, metavar="FILE", help="Write a page with plots; it needs nothing else.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Renew the section of this command in a document.")
def compare(
    modes: list[Mode],
    guests: list[GuestKind],
    rams: list[int],
    vcpus: list[int],
    rtts: list[float],
    rates: list[int],
    links: list[Link] | None,
    full: bool,
    runs: int,
    quick: bool,
    as_json: bool,
    html: Path | None,
    markdown: Path | None,
) -> None:
    """Move a VM by farfault and by QEMU's own post-copy, in turn, and compare what its guest noticed.

    The guest rewrites and verifies its memory, and measures its own accesses: a fault is what the guest saw as one,
    whoever served it. Downtime is from QEMU's own STOP on one side to its RESUME on the other. Every run ends with a
    check of the guest's whole memory. The first value of each list belongs to the reference scenario; its ratios
    stand in the JSON object as ``ratios``.

    \b
      farfault bench compare --quick
      farfault bench compare --guest random --ram 1GiB --vcpus 1,4 --rtt-ms 0 --runs 9
      farfault bench compare --guest random --link namespaces --rtt-ms 10 --rate 125MB/s --runs 9
      farfault bench compare --html compare.html --markdown docs/benchmarks.md

    Exit codes: 0 done, 1 a move failed, 2 wrong use, 3 no QEMU, no KVM or no namespaces here, 7 a guest found
    wrong memory.
    """
    end_on_sigterm()
    axes = Axes(guests, rams, vcpus, rtts, rates, links or ([Link.LOOPBACK] if quick else _usable_links()))
    _check(axes)
    scenarios = axes.every() if full else axes.star()
    if quick:
        scenarios, runs = [replace(axes.reference, ram_bytes=QUICK_RAM_BYTES)], min(runs, QUICK_RUNS)
    machine = describe_machine()
    if any(scenario.has_proxy for scenario in scenarios):
        machine["network proxy"] = describe_proxy()
        if not as_json:
            click.echo(f"the network proxy is the one {machine['network proxy']}", err=True)
    results = Results()
    for scenario in scenarios:
        _play_all(results, scenario, modes, runs, quiet=as_json)
        if not as_json:
            _print_table(results, scenario)
    report = {"machine": machine, "command": command_line(sys.argv[1:]), **results.to_json()}
    if html is not None:
        from farfault_client.bench.compare.html_report import html_report

        html.write_text(html_report(results, machine, report["command"]))
    if markdown is not None:
        from farfault_client.bench.compare.markdown_report import markdown_report

        replace_section(markdown, "compare", markdown_report(results, machine, report["command"]))
    if as_json:
        click.echo(json.dumps(report))
    if results.verification_errors:
        raise VerificationError(f"guests found {results.verification_errors} errors in their memory")


def _check(axes: Axes) -> None:
    for size in axes.ram_bytes:
        if size % (2 << 20) or size < RAM_MIN_BYTES:
            raise UsageError(f"--ram {size} is not a multiple of 2 MiB from {RAM_MIN_BYTES >> 20} MiB on")
    if any(not 1 <= count <= 64 for count in axes.vcpus):
        raise UsageError("--vcpus takes numbers from 1 to 64")
    if Link.NAMESPACES in axes.links:
        check_namespaces()
    if not shutil.which(QEMU):
        raise PreflightError(f"{QEMU} is not installed", "install QEMU; the comparison is with its own post-copy")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise PreflightError("/dev/kvm cannot be used", "the guest's own time means something only under KVM")


def _usable_links() -> list[Link]:
    try:
        with two_hosts():
            return list(Link)
    except FarfaultError as error:
        click.echo(f"no network namespaces here ({error.problem}); loopback only", err=True)
        return [Link.LOOPBACK]


def _play_all(results: Results, scenario: Scenario, modes: Sequence[Mode], runs: int, *, quiet: bool) -> None:
    for number in range(runs):
        for mode in order_of_modes(modes, number):
            run = play(scenario, mode)
            results.runs.append(run)
            if not quiet:
                click.echo(f"{scenario.title}, run {number + 1}/{runs}: {_line(run)}", err=True)


def _line(run: Run) -> str:
    fault = f"{run.mean_fault_us:,.0f} us" if run.mean_fault_us is not None else "none"
    return (
        f"{run.mode.value:<17} post-copy {run.postcopy_s:.2f} s, downtime {run.downtime_ms:.1f} ms, "
        f"{run.faults:,} faults, mean {fault}, {run.verification_errors} errors"
    )


def _print_table(results: Results, scenario: Scenario) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{scenario.title}: median and range")
    for index, heading in enumerate(headings(results, scenario)):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows(results, scenario):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for mode in results.modes(scenario):
        if not mode.is_native:
            ratios = results.ratios(scenario, mode)
            shown = ", ".join(f"{name} {ratio_text(ratio)}" for name, ratio in ratios.items())
            click.echo(f"{mode.value} over QEMU's better mode: {shown}")
