"""The demand lane without gRPC: frames on a plain stream, as `LaneHello` in pages.proto describes.

Same messages, same rules, same lease. An answer is handled within `data_received`, so that a fault costs no switch
between tasks on its way into memory.
"""

from __future__ import annotations

import asyncio
from typing import cast

from farfault.v1 import pages_pb2 as pb
from google.protobuf.message import DecodeError

from farfault_client.session.answers import BadAnswerError
from farfault_client.session.frames import FRAME_SLACK_BYTES, LENGTH, frame, hello
from farfault_client.session.grpc_lane import read_answer
from farfault_client.session.lane import Lane, LaneLostError, LaneStats, LaneUser
from farfault_client.session.lease import Lease, Peer

CONNECT_TIMEOUT_S = 3.0
SILENCE_MAX_S = 5.0
"""Nothing at all for this long while a request is unanswered says that the connection is half open."""
SILENCE_CHECK_S = 1.0


class ExpressLane(asyncio.Protocol):
    """A `LaneDriver` on a plain stream; make one with `connect`."""

    carrier = "express"
    is_ready = True

    def __init__(self, lease: Lease, user: LaneUser, stats: LaneStats, frame_bytes_max: int) -> None:
        self._lease = lease
        self._user = user
        self._stats = stats
        self._frame_bytes_max = frame_bytes_max
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._needed = LENGTH.size  # bytes of `_received` before it is worth a look
        self._welcomed = False
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._welcome: asyncio.Future[None] = self._loop.create_future()
        self._pump_scheduled = False
        self._unanswered = 0

    @classmethod
    async def connect(
        cls, peer: Peer, lease: Lease, user: LaneUser, stats: LaneStats, *, batch_bytes_max: int
    ) -> ExpressLane:
        """Connects and is let in.

        Raises:
            LaneLostError: it cannot be reached, or does not let us in; gRPC carries the lane then.
        """
        context = None
        if peer.tls is not None:
            from farfault_cli.tls import client_ssl_context

            context = client_ssl_context(peer.tls)
        host, _, port = peer.target.rpartition(":")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, lane = await loop.create_connection(
                    lambda: cls(lease, user, stats, batch_bytes_max + FRAME_SLACK_BYTES),
                    host.strip("[]"),
                    int(port),
                    ssl=context,
                )
                lane._write(hello(lease))
                await lane._welcome
        except (OSError, TimeoutError) as error:
            raise LaneLostError(f"express lane at {peer.target}: {error or 'no answer'}") from error
        return lane

    def pump(self) -> None:
        """A lone fault goes at once; with requests under way, those of one turn of the event loop travel together."""
        if not self._unanswered:
            self._send()
        elif not self._pump_scheduled:
            self._pump_scheduled = True
            self._loop.call_soon(self._send)

    def send_pages(self, frames: bytes, count: int) -> None:
        """Sends the frames of requests for one page each. The user is asked whether it knows their answers again
        (`LaneUser.page_came`); those that it does not are told as if it had given the requests to `pump`. Where the
        connection has just ended the requests are lost, as those are that were sent: `LaneUser.lane_lost`."""
        if self._ended.done():
            return  # a closed transport of uvloop's takes no bytes
        assert self._transport is not None
        self._unanswered += count
        self._transport.write(frames)

    async def run(self) -> None:
        await self._ended

    async def close(self) -> None:
        self._end(None)

    # ---- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(LaneLostError(f"express lane: {exc or 'the page server closed it'}"))

    def data_received(self, data: bytes) -> None:
        if self._received:
            self._received += data
            if len(self._received) < self._needed:
                return
            data = bytes(self._received)
            self._received.clear()
        position, end = self._take_pages(data), len(data)
        self._needed = LENGTH.size
        while end - position >= LENGTH.size:
            (length,) = LENGTH.unpack_from(data, position)
            if length > self._frame_bytes_max:
                self._end(BadAnswerError(f"a frame of {length} bytes, more than {self._frame_bytes_max}"))
                return
            if end - position - LENGTH.size < length:
                self._needed = LENGTH.size + length
                break
            position += LENGTH.size
            self._frame(data[position : position + length])
            position += length
        if position < end:
            self._received += data[position:]

    # ---- within ----------------------------------------------------------------------------------

    def _send(self) -> None:
        self._pump_scheduled = False
        if not self._welcomed or self._ended.done():
            return
        while (request := self._user.next_request(Lane.DEMAND)) is not None:
            self._unanswered += 1
            self._write(request.SerializeToString())

    def _write(self, message: bytes) -> None:
        assert self._transport is not None
        self._transport.write(frame(message))

    def _frame(self, message: bytes) -> None:
        if not self._welcomed:
            self._let_in(message)
            return
        self._stats.wire_bytes += LENGTH.size + len(message)
        try:
            _, answer = read_answer(message, self._lease)
        except BadAnswerError as error:
            self._end(error)
            return
        self._unanswered -= len(answer.done)
        self._stats.answers += 1
        self._user.answered(Lane.DEMAND, answer)

    def _take_pages(self, data: bytes) -> int:
        """Lets the user take frames at the beginning that bring what he awaits. Returns where the next begins."""
        position = 0
        while self._unanswered and position < len(data):
            came = self._user.page_came(data, position)
            if came is None:
                break
            self._unanswered -= 1
            self._stats.answers += 1
            self._stats.wire_bytes += came.end - position
            position = came.end
        return position

    def _let_in(self, message: bytes) -> None:
        try:
            welcome = pb.LaneWelcome.FromString(message)
        except DecodeError as error:
            self._end(LaneLostError(f"express lane: no welcome: {error}"))
            return
        if welcome.code:
            self._end(LaneLostError(f"express lane: {welcome.message}"))
            return
        self._welcomed = True
        self._welcome.set_result(None)

    def _end(self, error: Exception | None) -> None:
        if self._transport is not None:
            self._transport.abort()
        for future in (self._welcome, self._ended):
            if not future.done():
                if error is None:
                    future.cancel()
                else:
                    future.set_exception(error)
                    future.exception()  # seen, whoever waits
