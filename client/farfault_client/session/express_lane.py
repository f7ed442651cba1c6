"""The demand lane without gRPC: frames on a plain stream, as `LaneHello` in pages.proto describes.

Same messages, same rules, same lease. An answer is handled within `data_received`, so that a fault costs no switch
between tasks on its way into memory.
"""

from __future__ import annotations

import asyncio
from typing import cast

from farfault.codec import varint
from farfault.lone_page import ExpectedPage, request_message
from farfault.v1 import pages_pb2 as pb
from google.protobuf.message import DecodeError

from farfault_client.engine import Fetch
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
        self._expected: dict[bytes, tuple[Fetch, ExpectedPage]] = {}  # by the request id as it travels

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

    def fetch_page(self, fetch: Fetch) -> None:
        """Sends a request for one page. An answer that brings it and nothing else is told by `LaneUser.page_came`, any
        other as if the user had given the request to `pump`. Where the connection has just ended the request is lost,
        as those are that were sent: the user is told of all of them by `LaneUser.lane_lost`."""
        if self._ended.done():
            return  # a closed transport of uvloop's takes no bytes
        request_id, priority, ((page, _),), size_bytes = fetch
        region = self._lease.layout.region_of_page(page)
        index, number = region.index, page - region.first_page
        self._unanswered += 1
        self._write(request_message(request_id, priority, index, number))
        expected = ExpectedPage(request_id, index, number, size_bytes, self._lease.generation)
        self._expected[varint(request_id)] = fetch, expected

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
        position, end = 0, len(data)
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
        if self._expected and self._is_expected_page(message):
            return
        try:
            _, answer = read_answer(message, self._lease)
        except BadAnswerError as error:
            self._end(error)
            return
        self._unanswered -= len(answer.done)
        if self._expected:
            for request_id in answer.done:
                self._expected.pop(varint(request_id), None)
        self._stats.answers += 1
        self._user.answered(Lane.DEMAND, answer)

    def _is_expected_page(self, message: bytes) -> bool:
        """Deals with the answer to a `fetch_page`, if it is the common one."""
        entry = self._expected.pop(message[2 : 2 + message[1]], None) if len(message) > 1 else None
        if entry is None:
            return False
        fetch, expected = entry
        came = expected.read(message)
        if came is None or not self._user.page_came(fetch, came):
            return False
        self._unanswered -= 1
        self._stats.answers += 1
        return True

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
