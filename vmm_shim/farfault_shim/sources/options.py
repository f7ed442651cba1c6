"""The options of commands that look for a fault source: what they may try besides what they find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def host_options(function: F) -> F:
    """``--kernel-interface`` and ``--userfaultfd-device-fd``."""
    for option in reversed(
        (
            click.option(
                "--kernel-interface",
                "interface_texts",
                multiple=True,
                metavar="SERIES:flag=N:cap=N",
                envvar="FARFAULT_KERNEL_INTERFACE",
                help="A NOWAIT interface of a patched kernel, tried on a scratch VM; may be repeated.",
            ),
            click.option(
                "--userfaultfd-device-fd",
                type=click.IntRange(min=3),
                help="Inherited descriptor of /dev/userfaultfd, for a user who may not open it (systemd OpenFile=).",
            ),
        )
    ):
        function = option(function)
    return function
