"""``farfault probe``."""

from __future__ import annotations

import json
import sys

import click
from farfault_cli.errors import PreflightError

from farfault_shim.attach.wire import FaultSource
from farfault_shim.sources.choose import AUTO
from farfault_shim.sources.options import host_options

WISHES = (AUTO, *(source.value for source in FaultSource))


@click.command()
@click.option(
    "--fault-source",
    type=click.Choice(WISHES),
    default=AUTO,
    show_default=True,
    help="Ask for this one: is it possible here?",
)
@host_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def probe(
    fault_source: str, interface_texts: tuple[str, ...], userfaultfd_device_fd: int | None, as_json: bool
) -> None:
    """Show what this host can do for far memory, what is missing, and the remedy.

    Everything is tried, with scratch VMs where need be; versions are not looked at and nothing is changed.
    Run it as the user that will run the VMM: permissions are that user's.

    \b
    farfault probe
    farfault probe --json | jq -r .fault_source
    farfault probe --fault-source stock-nowait
    farfault probe --kernel-interface exit-on-missing:flag=0x8:cap=236

    Exit codes: 0 a fault source works, 2 wrong use, 3 none does.
    """
    from farfault_shim.probe.survey import survey
    from farfault_shim.sources.kernel_interface import parse_interface

    found = survey([parse_interface(text) for text in interface_texts], fault_source, userfaultfd_device_fd)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        from rich.console import Console

        from farfault_shim.probe.render import render

        render(found, Console())
    if found.choice.source is None:
        sys.exit(PreflightError.exit_code)
