"""The child process: ``python -m farfault_server.background.child DESCRIPTOR``. Started by `BackgroundProcess` only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final

import grpc.aio
import uvloop
from farfault_cli.errors import FarfaultError
from farfault_cli.helper_process import end_with_parent
from farfault_cli.logs import configure_logging
from farfault_cli.runtime import be_bulk, keep_freed_memory
from farfault_cli.tls import ServerTls

from farfault_server.background.wire import LINE_BYTES_MAX, REPORT_INTERVAL_S, Message, pack, regions_from_json
from farfault_server.express import ExpressListener
from farfault_server.lanes.limits import LaneLimits
from farfault_server.lanes.streams import Streams
from farfault_server.leases.keeper import LeaseKeeper
from farfault_server.leases.store import MemoryStore, book_from_json
from farfault_server.listening import CHANNEL_OPTIONS, keep_fresh, listen
from farfault_server.memory import ServedMemory
from farfault_server.rpc.page_service import PageService, ServerStats
from farfault_server.source_vm import VmOwner

logger = logging.getLogger(__name__)

STREAMS_END_S: Final = 1.0
"""Streams that were told to end may send what they have for this long."""


class Child:
    """Serves Background under the parent's record.

    Args:
        first: the parent's first message: regions, address, record.
        writer: to the parent.
    """

    def __init__(self, first: Message, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        regions = regions_from_json(first["regions"])
        self._streams = Streams()
        self._stats = ServerStats()
        memory = ServedMemory(regions)
        self._keeper = LeaseKeeper(book_from_json(first["book"]), MemoryStore(), memory)
        self._keeper.lease_ended = self._streams.end_lease
        memory.readable = first["readable"]
        pages = PageService(
            self._keeper,
            VmOwner(None, self._keeper),
            LaneLimits.for_regions(regions),
            self._streams,
            self._stats,
        )
        self._server = grpc.aio.server(options=list(CHANNEL_OPTIONS))
        self._server.add_generic_rpc_handlers((pages.background_handler(),))
        self._host, self._wanted_express_port = first["host"], first["express_port"]
        self._tls = ServerTls(Path(first["tls"])) if first["tls"] else None
        self._express = ExpressListener(
            self._keeper, LaneLimits.for_regions(regions), self._streams, self._stats.background
        )
        self.port = listen(self._server, first["host"], first["port"], self._tls)

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Serves until the parent is gone."""
        await self._server.start()
        express_port = 0
        if self._wanted_express_port is not None:
            context = self._tls.ssl_context if self._tls is not None else None
            await self._express.start(self._host, self._wanted_express_port, context)
            express_port = self._express.port
        self._say({"port": self.port, "express_port": express_port})
        chores = [asyncio.create_task(self._report(), name="report")]
        if self._tls is not None:
            chores.append(asyncio.create_task(keep_fresh(self._tls), name="refresh TLS"))
        try:
            with contextlib.suppress(ConnectionResetError):  # the parent was killed in the middle of a message
                while line := await reader.readline():
                    self._follow(json.loads(line))
        finally:
            for chore in chores:
                chore.cancel()
            self._streams.end_all()
            await self._express.stop()
            await self._server.stop(STREAMS_END_S)

    def _follow(self, message: Message) -> None:
        self._keeper.adopt(book_from_json(message["book"]), readable=message["readable"])
        self._say({"acknowledged": message["number"], **self._counters()})

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._say(self._counters())

    def _counters(self) -> Message:
        return {"stats": self._stats.background.to_json(), "leases": self._streams.lease_ids}

    def _say(self, message: Message) -> None:
        self._writer.write(pack(message))


async def run(descriptor: int) -> None:
    """Serves until the parent closes its end of the socket pair."""
    connection = socket.socket(fileno=descriptor)
    reader, writer = await asyncio.open_connection(sock=connection, limit=LINE_BYTES_MAX)
    first: dict[str, Any] = json.loads(await reader.readline())
    configure_logging(level=first["log_level"], as_json=first["json_logs"])
    try:
        child = Child(first, writer)
    except FarfaultError as error:
        writer.write(pack({"error": str(error)}))
        await writer.drain()
        return
    await child.run(reader)


def main() -> None:
    """The parent alone decides when the child ends."""
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    be_bulk()
    uvloop.run(run(int(sys.argv[1])))


if __name__ == "__main__":
    main()
