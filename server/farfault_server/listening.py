"""Ports of a server: binding gRPC with the same options in every process, and certificates that follow their files."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

import grpc.aio
from farfault_cli.errors import FarfaultError, UsageError
from farfault_cli.tls import ServerTls

from farfault_server.lanes.limits import REQUEST_BYTES_MAX

logger = logging.getLogger(__name__)

MESSAGE_BYTES_MAX: Final = 8 << 20
"""Of an answer; a request is bound by `REQUEST_BYTES_MAX`."""
CALLS_PER_CONNECTION_MAX: Final = 256

CHANNEL_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server on it
    ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION_MAX),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # without it a half-open connection is noticed after a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),  # clients ping to notice a loss early
)


def listen(server: grpc.aio.Server, host: str, port: int, tls: ServerTls | None) -> int:
    """Binds.

    Args:
        server: not started yet.
        host: a name, or an address without brackets.
        port: 0: any.
        tls: None: plain.

    Returns:
        The port that is bound.

    Raises:
        UsageError: the address cannot be had.
    """
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, tls.grpc_credentials())
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise UsageError(
            f"cannot listen on {address}",
            "another program uses the port, or the address is not of this host; port 0 takes any free port",
        )
    return bound


TLS_REFRESH_S: Final = 5.0
"""How often express listeners look whether their certificate was renewed."""


async def keep_fresh(tls: ServerTls) -> None:
    """Follows the TLS files until it is cancelled."""
    while True:
        await asyncio.sleep(TLS_REFRESH_S)
        try:
            tls.refresh()
        except FarfaultError as error:
            logger.warning("the old certificate goes on: %s", error)
