"""The command ``farfault``: a group whose subcommands are found by the entry points ``farfault.commands``."""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click

from farfault_cli import __version__
from farfault_cli.errors import FarfaultError
from farfault_cli.settings import (
    CONFIG_DEFAULT,
    CONFIG_VARIABLE,
    bind_environment,
    check_tables,
    defaults_of,
    read_config,
)

ENTRY_POINT_GROUP = "farfault.commands"
GRPC_ENVIRONMENT = {
    "GRPC_ENABLE_FORK_SUPPORT": "0",  # child processes are started with exec: nothing of gRPC lives on in them
    "GRPC_VERBOSITY": "ERROR",  # what goes wrong with a connection is logged by us, as text or JSON
}
"""Read by gRPC when it is loaded; what the user has set stays."""


class EntryPointGroup(click.Group):
    """A group that imports a subcommand only when it is named, so that ``farfault probe`` loads no gRPC."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for entry in entry_points(group=ENTRY_POINT_GROUP, name=cmd_name):
            command: click.Command = entry.load()
            bind_environment(command, (cmd_name,))
            return command
        return None


@click.command(cls=EntryPointGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar=CONFIG_VARIABLE,
    metavar="FILE",
    help=f"Configuration file.  [default: {CONFIG_DEFAULT}, where it exists]",
)
@click.version_option(__version__, prog_name="farfault")
@click.pass_context
def farfault(context: click.Context, config: Path | None) -> None:
    """Move running VMs between hosts by post-copy.

    The VM runs on the destination at once; each page it misses is fetched from the source's page server
    on demand, ahead of the rest of memory.

    \b
    Try it:               farfault demo
    What can this host?   farfault probe
    Source host:          farfault serve --ram /dev/shm/vm.ram --qmp /run/vm.qmp
    Destination host:     farfault migrate --source SOURCE:7777 ...

    Every option can be set by a flag, else by its variable (`receive --json-logs`: FARFAULT_RECEIVE_JSON_LOGS), else in
    the configuration file (TOML; table [receive], key json-logs).

    Exit codes: 0 done, 1 failed, 2 wrong use, 3 refused by preflight, 4 rolled back (source runs),
    5 guest waits (nothing lost), 6 other side unreachable, 7 verification failed, 8 slower than the objective.
    """
    tables = read_config(config)
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config.absolute())  # for the farfault commands that this one starts
    group, name = context.command, context.invoked_subcommand
    assert isinstance(group, click.Group)
    check_tables(tables, group.list_commands(context), config or CONFIG_DEFAULT)
    command = group.get_command(context, name) if name in tables else None
    if command is not None and name is not None:
        context.default_map = {name: defaults_of(command, tables[name], f"{config or CONFIG_DEFAULT}: [{name}]")}


def main() -> None:
    """Entry point: runs the command; a FarfaultError becomes one message and its exit code."""
    for variable, value in GRPC_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        farfault(prog_name="farfault", standalone_mode=False)
    except FarfaultError as error:
        click.echo(f"farfault: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
