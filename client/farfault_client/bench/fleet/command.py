"""The command ``farfault bench fleet``."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import click
from farfault_cli.errors import PreflightError, UsageError, VerificationError
from farfault_cli.sizes import SIZE
from farfault_shim.guest import GuestKind

from farfault_client.bench.document import machine_text, markdown_table, replace_section
from farfault_client.bench.fleet.figures import (
    FLEET_HEADINGS,
    METRICS,
    FleetFigures,
    fleet_rows,
    verdict_lines,
    vm_rows,
)
from farfault_client.bench.fleet.run import play
from farfault_client.bench.machine import command_line, describe_machine
from farfault_client.demo.command import GUEST_RAM_MIN_BYTES
from farfault_client.demo.fault_source import FAULT_SOURCES, choose_fault_source
from farfault_client.demo.processes import end_on_sigterm
from farfault_client.demo.scene import SceneConfig
from farfault_client.demo.vms import QEMU, VmmKind
from farfault_client.options import FILE

VMS_DEFAULT: Final = 64
VMS_MAX: Final = 256
RAM_DEFAULT_BYTES: Final = 32 << 20
HELPERS_BYTES: Final = 160 << 20
"""Memory of the processes around one VM, both sides, without its RAM."""


@click.command()
@click.option("--vms", type=click.IntRange(1, VMS_MAX), default=VMS_DEFAULT, show_default=True)
@click.option(
    "--ram",
    "ram_bytes",
    type=SIZE,
    default=RAM_DEFAULT_BYTES,
    show_default="32MiB",
    help="Of each; its guest works on what is above 16 MiB.",
)
@click.option(
    "--vmm",
    type=click.Choice([kind.value for kind in VmmKind]),
    help="Default: reference where there is /dev/kvm, else simulated.",
)
@click.option(
    "--fault-source",
    type=click.Choice(FAULT_SOURCES),
    default="auto",
    show_default=True,
    help="How vCPUs miss pages; auto: NOWAIT exits where this host can annotate them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, nothing else.")
@click.option("--markdown", type=FILE, metavar="FILE", help="Renew the section of this command in a document.")
def fleet(vms: int, ram_bytes: int, vmm: str | None, fault_source: str, as_json: bool, markdown: Path | None) -> None:
    """Move many VMs to one host at once: is it fair, does any of them starve?

    Each VM has one vCPU, and a page server and a receiver of its own. All are started, a few at a time; when every
    receiver is ready and every guest runs, all are told to move at the same moment. Source and destination are this
    machine, and no guest ever rests: the processors are shared by far more than two hosts would have to share.

    Jain's index says how evenly pages a second are spread (1: all alike, 1/N: one VM has everything). The longest
    time without a page says whether anybody starved: it counts while a VM ran here and missed pages. Every VM is
    checked at the end, by its guest and from outside.

    \b
      farfault bench fleet
      farfault bench fleet --vms 8 --ram 128MiB --vmm qemu
      farfault bench fleet --vms 16 --json | jq '.fairness, .spreads.longest_pause_s'

    Exit codes: 0 done, 1 a move failed, 2 wrong use, 3 this machine cannot, 7 a guest found wrong memory.
    """
    kind = VmmKind(vmm) if vmm else _default_vmm()
    _check(kind, vms, ram_bytes)
    end_on_sigterm()
    config = SceneConfig(
        kind, ram_bytes=ram_bytes, vcpus=1, guest=GuestKind.RANDOM, fault_source=choose_fault_source(kind, fault_source)
    )
    found = play(config, vms, lambda text: None if as_json else click.echo(text, err=True))
    machine, command = describe_machine(), command_line(sys.argv[1:])
    title = f"{vms} VMs at once, {kind.title}, {ram_bytes >> 20} MiB each, {config.fault_source}"
    if markdown is not None:
        replace_section(markdown, "fleet", markdown_report(found, title, machine, command))
    if as_json:
        setup: dict[str, Any] = {"vmm": kind.value, "ram_bytes": ram_bytes, "fault_source": config.fault_source}
        click.echo(json.dumps({"machine": machine, "command": command, **setup, **found.to_json()}))
    else:
        _print(found, title)
    if found.verification_errors:
        raise VerificationError(f"guests found {found.verification_errors} errors in their memory")


def markdown_report(found: FleetFigures, title: str, machine: dict[str, str], command: str) -> str:
    """The section of docs/benchmarks.md: the fleet, not each of its VMs."""
    verdict = "\n".join(f"- {line}" for line in verdict_lines(found))
    table = markdown_table(FLEET_HEADINGS, fleet_rows(found))
    parts = ["## Many VMs received at once", machine_text(machine, command), f"{title}.", table, verdict]
    return "\n\n".join(parts)


def _default_vmm() -> VmmKind:
    return VmmKind.REFERENCE if _has_kvm() else VmmKind.SIMULATED


def _has_kvm() -> bool:
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def _check(kind: VmmKind, vms: int, ram_bytes: int) -> None:
    if ram_bytes % (2 << 20) or ram_bytes < GUEST_RAM_MIN_BYTES:
        raise UsageError(f"--ram {ram_bytes} is not a multiple of 2 MiB from {GUEST_RAM_MIN_BYTES >> 20} MiB on")
    if kind is not VmmKind.SIMULATED and not _has_kvm():
        raise PreflightError("/dev/kvm cannot be used", "add --vmm simulated, or run on a host with KVM")
    if kind is VmmKind.QEMU and not shutil.which(QEMU):
        raise PreflightError(f"{QEMU} is not installed", "install QEMU, or add --vmm reference")
    needed, free = vms * (2 * ram_bytes + HELPERS_BYTES), _available_bytes()
    if needed > free:
        problem = f"{vms} VMs need about {needed >> 20:,} MiB, and {free >> 20:,} MiB are available"
        raise PreflightError(problem, f"add --vms {max(1, free * vms // needed)}")


def _available_bytes() -> int:
    """MemAvailable of /proc/meminfo (proc(5))."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def _print(found: FleetFigures, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    headings = ["VM", *(metric.title for metric in METRICS)]
    for name, columns, rows in (("each VM", headings, vm_rows(found)), (title, FLEET_HEADINGS, fleet_rows(found))):
        table = Table(title=name)
        for index, heading in enumerate(columns):
            table.add_column(heading, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in verdict_lines(found):
        click.echo(line)
