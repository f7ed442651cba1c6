"""One page stream over gRPC: reads requests, writes batches, holds at most one batch of them in memory."""

from __future__ import annotations

import asyncio
from typing import Final

import grpc.aio
from google.protobuf.message import DecodeError

from farfault_server.lanes.answering import Answering
from farfault_server.lanes.streams import Streams
from farfault_server.leases.refusals import Code, RefusedError
from farfault_server.rpc.calls import Context

YIELDS_MAX: Final = 64
"""Turns of the event loop for which a background stream lets demand go first, before each of its batches."""


class PageStream:
    """The driver of one `Demand` or `Background` call. Messages are raw bytes in both directions.

    Args:
        context: of the call.
        core: answers the requests.
        streams: where `demand_waits` is asked.
        is_background: lets demand go first.
    """

    def __init__(self, context: Context, core: Answering, streams: Streams, *, is_background: bool) -> None:
        self._context = context
        self._core = core
        self._streams = streams
        self._is_background = is_background
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._is_ended = False
        self._error: RefusedError | None = None

    def end(self) -> None:
        """Ends the call after the batch that is being written; the client sees a normal end."""
        self._is_ended = True
        self._core.line.clear()
        self._work.set()

    async def run(self) -> None:
        """Serves until the client closes its side or `end` is called.

        Raises:
            RefusedError: the client sent something that is no request.
        """
        reader = asyncio.create_task(self._read(), name="read requests")
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                await self._answer_waiting()
                if self._error is not None:
                    raise self._error
                if self._is_ended:
                    return
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _answer_waiting(self) -> None:
        while (batch := self._core.next_batch()) is not None:
            self._room.set()
            try:
                await self._context.write(batch)
            except grpc.aio.InternalError:  # the client left while it was being written
                self.end()
                return
            if self._is_background:
                await self._let_demand_go_first()

    async def _let_demand_go_first(self) -> None:
        for _ in range(YIELDS_MAX):
            if not self._streams.demand_waits:
                return
            await asyncio.sleep(0)

    async def _read(self) -> None:
        try:
            while (message := await self._context.read()) is not grpc.aio.EOF:
                assert isinstance(message, bytes)
                self._core.receive(message)
                self._work.set()
                while self._core.line.is_full:
                    self._room.clear()
                    await self._room.wait()
        except DecodeError:
            self._error = RefusedError(Code.INVALID_ARGUMENT, "a message of the stream is no FetchRequest")
        finally:
            self._is_ended = True
            self._work.set()
