"""Command-line options that several commands share, and what they mean."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import xxhash
from farfault_cli.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


def log_options(function: F) -> F:
    """``--log-level`` and ``--json-logs``."""
    function = click.option("--json-logs", is_flag=True, help="One JSON object a log line.")(function)
    levels = click.Choice(["debug", "info", "warning", "error"])
    return click.option("--log-level", type=levels, default="info", show_default=True, help="Least level logged.")(
        function
    )


def source_options(function: F) -> F:
    """How to reach a page server."""
    for option in reversed(
        (
            click.option("--source", metavar="HOST:PORT", help="The page server (`farfault serve`) of the VM."),
            click.option(
                "--tls", type=FILE, metavar="DIR", help="Folder with ca.pem, and cert.pem and key.pem for mutual TLS."
            ),
            click.option("--insecure", is_flag=True, help="Plain TCP to a page server on another host."),
            click.option(
                "--admission-token-file", type=FILE, metavar="FILE", help="What the server asks for before a lease."
            ),
            click.option("--no-express", is_flag=True, help="Fetch demand pages over gRPC only."),
        )
    ):
        function = option(function)
    return function


def default_state(attach: Path) -> Path:
    """Where the record of a move goes by default: memory that outlives a process but not a host, as the VM does.

    Args:
        attach: the receiver's socket; the same one finds the same record.
    """
    if os.geteuid() == 0:  # each record is synced, within the downtime too: no disk
        runtime = "/run/farfault" if os.path.ismount("/run") else "/dev/shm/farfault"
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if not runtime:
        raise UsageError("no XDG_RUNTIME_DIR for the record of the move", "name a folder with --state")
    where = xxhash.xxh32_hexdigest(os.fsencode(attach.absolute()))
    return Path(runtime) / f"receive-{attach.name}-{where}"


def split_target(target: str) -> tuple[str, int]:
    """``host:port``; IPv6 hosts stand in brackets. Raises UsageError."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{target!r} is not HOST:PORT", "for example 192.0.2.7:7777 or [2001:db8::7]:7777")
    return host.strip("[]"), int(port)
