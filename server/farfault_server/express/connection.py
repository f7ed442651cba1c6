"""One express connection: requests are parsed, read and answered within the call that brings the bytes."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Final, cast

from farfault.v1 import pages_pb2 as pb
from google.protobuf.message import DecodeError

from farfault_server.express.frames import LENGTH, FrameBuffer, FrameTooLongError
from farfault_server.lanes.answering import Answering
from farfault_server.lanes.limits import REQUEST_BYTES_MAX
from farfault_server.leases.book import PROTOCOL_VERSION
from farfault_server.leases.refusals import Code, RefusedError

if TYPE_CHECKING:
    from farfault_server.express.listener import ExpressListener

logger = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 5.0
"""A connection that has not said hello by then is closed."""
WRITE_BYTES_HIGH: Final = 1 << 20
"""Answers that the client does not take pile up to this, and a batch; then its requests wait."""
BATCHES_PER_TURN_MAX: Final = 4
"""Answers that one connection gets before others have their turn: answers of zero pages take time but no room."""
LONE_PER_TURN_MAX: Final = 16
"""Pages that are answered while requests are taken; more of them go to the core and share batches."""
JOINED_BYTES_MAX: Final = 32 << 10
"""Up to this size a copy costs less than several pieces."""
PEER_SILENCE_S: Final = 15
"""A client whose host does not acknowledge anything for this long is gone."""
KEEPALIVE_S: Final = 5


class ExpressConnection(asyncio.BufferedProtocol):
    """The driver of one connection.

    Args:
        listener: what all connections share.
    """

    def __init__(self, listener: ExpressListener) -> None:
        self._listener = listener
        self._frames = FrameBuffer(REQUEST_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._core: Answering | None = None
        self._lease_id = ""
        self._hello_timer: asyncio.TimerHandle | None = None
        self._is_writable = True
        self._is_reading = True
        self._has_next_turn = False

    # ---- asyncio.BufferedProtocol ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are of no such class
        if not self._listener.admit(self):
            self.abort()
            return
        self._transport.set_write_buffer_limits(high=WRITE_BYTES_HIGH)
        _watch_peer(transport.get_extra_info("socket"))
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self.abort)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._frames.writable()

    def buffer_updated(self, nbytes: int) -> None:
        self._frames.wrote(nbytes)
        try:
            self._consume()
        except (FrameTooLongError, DecodeError) as error:
            logger.warning("express connection dropped: %s", error)
            self.abort()

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        self.buffer_updated(0)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self._listener.lost(self)
        if self._core is not None:
            self._listener.streams.remove(self._lease_id, self.end, self._core.line)
            self._listener.stats.streams -= 1
            self._listener.keeper.saw(self._lease_id)

    # ---- within ----------------------------------------------------------------------------------

    def end(self) -> None:
        """Closes when what was answered is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Closes at once."""
        if self._transport is not None:
            self._transport.abort()

    def _consume(self) -> None:
        """Takes all requests that have come, then answers a turn of them: what came together travels together."""
        self._parse()
        self._answer()
        core = self._core
        if core is not None and core.line and self._is_writable and not self._has_next_turn:
            self._has_next_turn = True
            asyncio.get_running_loop().call_soon(self._take_turn)
        self._set_reading(core is None or not core.line.is_full)

    def _take_turn(self) -> None:
        self._has_next_turn = False
        if self._transport is not None and not self._transport.is_closing():
            self.buffer_updated(0)

    def _parse(self) -> None:
        """Takes requests; plain ones for one page, before which nothing waits, are answered at once."""
        core, lone = self._core, 0
        while core is None or not core.line.is_full:
            frame = self._frames.next_frame()
            if frame is None:
                return
            if core is not None:
                if lone < LONE_PER_TURN_MAX and self._answer_lone(core, frame):
                    lone += 1
                else:
                    core.receive(frame)
            elif not self._greet(frame):
                return
            else:
                core = self._core

    def _answer_lone(self, core: Answering, message: bytes) -> bool:
        """Answers a request before which nothing waits, if it is a plain one for one page."""
        if self._transport is None or not self._is_writable:
            return False
        answer = core.lone_answer(message)
        if answer is None:
            return False
        self._transport.write(answer.frame)
        core.lone_answered(answer)
        return True

    def _answer(self) -> None:
        core, transport = self._core, self._transport
        if core is None or transport is None:
            return
        for _ in range(BATCHES_PER_TURN_MAX):
            if not self._is_writable or (pieces := core.next_pieces()) is None:
                return
            self._write(transport, pieces)

    def _write(self, transport: asyncio.Transport, pieces: list[bytes]) -> None:
        size_bytes = sum(map(len, pieces))
        if size_bytes > JOINED_BYTES_MAX:
            transport.writelines((LENGTH.pack(size_bytes), *pieces))
        else:
            transport.write(b"".join((LENGTH.pack(size_bytes), *pieces)))

    def _set_reading(self, is_reading: bool) -> None:
        if is_reading is self._is_reading or self._transport is None or self._transport.is_closing():
            return
        self._is_reading = is_reading
        if is_reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _greet(self, frame: bytes) -> bool:
        """The first frame. Returns whether the client is let in."""
        try:
            self._let_in(pb.LaneHello.FromString(frame))
        except RefusedError as error:
            logger.info("refused an express connection: %s", error.problem)
            self._welcome(pb.LaneWelcome(code=error.code, message=str(error)))
            self.end()
            return False
        self._welcome(pb.LaneWelcome())
        return True

    def _let_in(self, hello: pb.LaneHello) -> None:
        if hello.protocol_version != PROTOCOL_VERSION:
            raise RefusedError(
                Code.FAILED_PRECONDITION,
                f"the client speaks protocol version {hello.protocol_version}, the server {PROTOCOL_VERSION}",
                "run the same farfault version on both hosts",
            )
        lease = self._listener.keeper.authorize(hello.lease_id, hello.token)
        core = self._listener.new_core()
        self._listener.streams.add(lease.lease_id, self.end, core.line)
        self._listener.stats.streams += 1
        self._core, self._lease_id = core, lease.lease_id
        if self._hello_timer is not None:
            self._hello_timer.cancel()

    def _welcome(self, welcome: pb.LaneWelcome) -> None:
        assert self._transport is not None
        message = welcome.SerializeToString()
        self._transport.write(LENGTH.pack(len(message)) + message)


def _watch_peer(connection: socket.socket | None) -> None:
    """A plain stream notices a dead host only where it is told to."""
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_SILENCE_S * 1000)
