"""The command group ``farfault bench``; a subcommand is imported when it is named."""

from __future__ import annotations

from importlib import import_module
from typing import Final

import click

SUBCOMMANDS: Final = {
    "compare": "farfault_client.bench.compare.command:compare",
    "fleet": "farfault_client.bench.fleet.command:fleet",
    "micro": "farfault_client.bench.micro.command:micro",
    "vcpus": "farfault_client.bench.vcpus.command:vcpus",
}


class LazyGroup(click.Group):
    """A group whose subcommands are named in `SUBCOMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = SUBCOMMANDS.get(cmd_name)
        if place is None:
            return None
        module, _, name = place.partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.command(cls=LazyGroup)
def bench() -> None:
    """Measure, always as ratios within one run.

    \b
      farfault bench compare    whole moves beside QEMU's own post-copy
      farfault bench micro      single steps of a fault beside C
      farfault bench vcpus      missed pages a second by number of vCPUs
      farfault bench fleet      many VMs received at once: is it fair?
      farfault bench compare --quick

    Other work on the machine disturbs every figure: cases that are compared run in turn, figures are medians, and
    the share of CPU time that others took is printed beside them.
    """
