"""``farfault completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from farfault_cli.errors import UsageError


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
      farfault completion bash > /etc/bash_completion.d/farfault
      farfault completion zsh > "${fpath[1]}/_farfault"
      farfault completion fish > ~/.config/fish/completions/farfault.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"this version of click knows no completion for {shell}", "install click 8.1 or newer")
    click.echo(kind(context.find_root().command, {}, "farfault", "_FARFAULT_COMPLETE").source())
