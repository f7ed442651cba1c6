"""A lease as its holder knows it, and the peer that granted it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import grpc
import grpc.aio
from farfault_cli.errors import FarfaultError, UnreachableError
from farfault_shim.layout import Layout

PROTOCOL_VERSION = 1
MESSAGE_BYTES_MAX = 8 << 20

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for each channel
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # without it a half-open connection is noticed after a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # The session has a back-off of its own; gRPC's would grow to two minutes beside it.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # also the time that one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


@dataclass(slots=True)
class Lease:
    """What is needed to fetch pages under a lease. All lanes of a session share one, so that they see changes.

    Attributes:
        lease_id, token: name and secret.
        generation: of the memory; answers of another one are refused. Set when the memory is frozen.
        layout: the regions that the server holds.
    """

    lease_id: str
    token: str
    generation: int
    layout: Layout

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call but Open."""
        return (("farfault-lease", self.lease_id), ("authorization", f"Bearer {self.token}"))

    def __repr__(self) -> str:  # the token stays out of logs
        return f"Lease({self.lease_id}, generation {self.generation}, {self.layout})"


class LeaseKey(NamedTuple):
    """Name, secret and generation of a lease: what a holder keeps on disk."""

    lease_id: str
    token: str
    generation: int


@dataclass(frozen=True, slots=True)
class Peer:
    """A page server's address.

    Attributes:
        target: ``host:port``.
        credentials: None for plain TCP.
        tls: the folder that they came from, for lanes that do not go over gRPC.
    """

    target: str
    credentials: grpc.ChannelCredentials | None = None
    tls: Path | None = None

    @property
    def host(self) -> str:
        """The host without its port; brackets of an IPv6 address are taken off."""
        return self.target.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.target.rpartition(":")[2])

    def at_port(self, port: int) -> Peer:
        """The same host at another port."""
        return replace(self, target=f"{self.target.rpartition(':')[0]}:{port}")

    def channel(self) -> grpc.aio.Channel:
        """A new connection."""
        if self.credentials is not None:
            return grpc.aio.secure_channel(self.target, self.credentials, options=list(CHANNEL_OPTIONS))
        return grpc.aio.insecure_channel(self.target, options=list(CHANNEL_OPTIONS))


def explain(error: grpc.aio.AioRpcError, target: str) -> FarfaultError:
    """What a gRPC status means to a user."""
    details = error.details() or error.code().name
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return UnreachableError(
            f"page server {target} does not answer: {details}",
            "check that `farfault serve` runs there, the address, TLS on both sides, and the firewall",
        )
    problem, _, remedy = details.partition("\n  remedy: ")
    return FarfaultError(f"page server {target}: {problem} ({error.code().name})", remedy)
