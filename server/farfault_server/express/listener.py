"""The port of the express lane and what its connections share."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field
from typing import Final

from farfault_cli.errors import UsageError

from farfault_server.clock import clock_us
from farfault_server.express.connection import ExpressConnection
from farfault_server.lanes.answering import Answering
from farfault_server.lanes.limits import LaneLimits
from farfault_server.lanes.lone_answers import LoneAnswers
from farfault_server.lanes.stats import LaneStats
from farfault_server.lanes.streams import Streams
from farfault_server.leases.keeper import LeaseKeeper

CONNECTIONS_MAX: Final = 256
"""Open at a time, those that have not said hello included; more are closed at once."""
BACKLOG: Final = 128


@dataclass(slots=True)
class ExpressListener:
    """Accepts express connections. `start`, then `stop`.

    Attributes:
        keeper, limits, streams, stats: shared by all connections.
        port: that is bound, after `start`.
    """

    keeper: LeaseKeeper
    limits: LaneLimits
    streams: Streams
    stats: LaneStats
    port: int = 0
    _connections: set[ExpressConnection] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _lone: LoneAnswers = field(init=False)

    def __post_init__(self) -> None:
        self._lone = LoneAnswers(self.keeper.memory.regions)

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None = None) -> None:
        """Listens.

        Args:
            host: address to listen on.
            port: 0: any.
            tls: None: plain.

        Raises:
            UsageError: the address cannot be had.
        """
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: ExpressConnection(self), host, port, ssl=tls, backlog=BACKLOG, reuse_port=False
            )
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port} for the express lane: {error.strerror}",
                "name another --express-port, 0 for any, or use --no-express",
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Accepts nothing more and drops what is open."""
        if self._server is not None:
            self._server.close()
            for connection in list(self._connections):
                connection.abort()
            await self._server.wait_closed()

    def admit(self, connection: ExpressConnection) -> bool:
        """Whether one more connection may be open."""
        if len(self._connections) >= CONNECTIONS_MAX:
            return False
        self._connections.add(connection)
        return True

    def lost(self, connection: ExpressConnection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)

    def new_core(self) -> Answering:
        """For a client that was let in."""
        return Answering(self.keeper.memory, self.limits, self.stats, clock_us, self._lone)
