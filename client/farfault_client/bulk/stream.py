"""Bulk without gRPC: each frame of an express background lane is received into one buffer, and placed from there.

Nothing copies the pages between the kernel's socket and the installation: the checksum is taken where they lie, and
the buffer is small enough to stay in the processor's cache.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, NamedTuple, cast

from farfault.codec import DecodedBatch, decode_view
from farfault.v1 import pages_pb2 as pb
from farfault_shim.install.installer import InstallError
from farfault_shim.uffd.userfaultfd import MappedBytes
from google.protobuf.message import DecodeError

from farfault_client.session.answers import Answer, BadAnswerError, verify
from farfault_client.session.frames import LENGTH, frame, hello
from farfault_client.session.lane import LaneLostError
from farfault_client.session.lease import Lease, Peer

CONNECT_TIMEOUT_S: Final = 10.0
WELCOME_BYTES_MAX: Final = 4096
WAKE_BYTES: Final = 256 << 10
"""The rest of a frame wakes the process when so much of it has come, or all: on a slow link it comes in dozens of
pieces, and none but the last is of any use."""


class StreamAnswer(NamedTuple):
    """A verified answer; its data are in the stream's buffer until the next one comes.

    Attributes:
        batch, answer: the same answer as it came, and as it was understood.
        wire_bytes: of its frame.
    """

    batch: DecodedBatch
    answer: Answer
    wire_bytes: int


class BulkStream(asyncio.BufferedProtocol):
    """One connection; make it with `connect`.

    Args:
        lease: whose pages.
        buffer: where frames go; no frame is longer.
        on_answer: gets every verified answer; what it raises ends the stream.
    """

    def __init__(self, lease: Lease, buffer: MappedBytes, on_answer: Callable[[StreamAnswer], None]) -> None:
        self._lease = lease
        self._buffer = buffer
        self._on_answer = on_answer
        self._transport: asyncio.Transport | None = None
        self._head = bytearray(LENGTH.size)
        self._head_view = memoryview(self._head)
        self._received = 0
        self._frame_bytes = 0  # 0: the length is being received
        self._target = self._head_view
        self._plain_socket: socket.socket | None = None
        self._wakes_at_bytes = 1  # SO_RCVLOWAT
        self._welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def greet(self) -> None:
        """Says hello, and returns when the server lets us in.

        Raises:
            LaneLostError: it does not.
        """
        self.send(hello(self._lease))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._welcomed
        except TimeoutError:
            raise LaneLostError("the page server did not let the bulk stream in") from None

    def send(self, message: bytes) -> None:
        """Sends a frame; one that comes after the end is lost, as those are that were on their way."""
        if self._ended.done():
            return  # a closed transport of uvloop's takes no bytes
        assert self._transport is not None
        self._transport.write(frame(message))

    def pause(self) -> None:
        """Takes no more answers until `resume`; the network waits."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Goes on after `pause`."""
        if self._transport is not None:
            self._transport.resume_reading()

    async def run(self) -> None:
        """Until the connection ends.

        Raises:
            LaneLostError, BadAnswerError: why.
        """
        await self._ended

    def close(self) -> None:
        """Drops the connection."""
        self._end(LaneLostError("closed"))

    # ---- asyncio.BufferedProtocol ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class
        if transport.get_extra_info("ssl_object") is None:  # else a part of the rest may have left the socket already
            self._plain_socket = transport.get_extra_info("socket")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(LaneLostError(f"bulk stream: {exc or 'the page server closed it'}"))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self._received :]

    def buffer_updated(self, nbytes: int) -> None:
        self._received += nbytes
        if self._ended.done():
            return
        if self._received < len(self._target):
            self._wake_at(len(self._target) - self._received)
            return
        try:
            if self._frame_bytes:
                self._frame()
            else:
                self._begin_frame()
        except (BadAnswerError, LaneLostError) as error:
            self._end(error)
        except InstallError as error:
            self._end(LaneLostError(str(error)))

    # ---- within ----------------------------------------------------------------------------------

    def _begin_frame(self) -> None:
        (self._frame_bytes,) = LENGTH.unpack(self._head)
        if not self._welcomed.done():
            if self._frame_bytes > WELCOME_BYTES_MAX:
                raise LaneLostError("the page server answers with something else than a welcome")
            self._target, self._received = memoryview(bytearray(self._frame_bytes)), 0
            if not self._frame_bytes:
                self._frame()
            return
        if not 0 < self._frame_bytes <= len(self._buffer):
            raise BadAnswerError(f"a frame of {self._frame_bytes} bytes, the limit is {len(self._buffer)}")
        self._target, self._received = self._buffer.view[: self._frame_bytes], 0
        self._wake_at(self._frame_bytes)

    def _frame(self) -> None:
        self._wake_at(LENGTH.size)
        body, frame_bytes = self._target, self._frame_bytes
        self._target, self._received, self._frame_bytes = self._head_view, 0, 0
        if not self._welcomed.done():
            self._let_in(bytes(body))
            return
        try:
            batch = decode_view(body)
        except DecodeError as error:
            raise BadAnswerError(str(error)) from None
        answer = verify(batch, self._lease.layout, self._lease.generation)
        self._on_answer(StreamAnswer(batch, answer, LENGTH.size + frame_bytes))

    def _wake_at(self, missing_bytes: int) -> None:
        """The socket is readable when so many bytes have come, or enough of them."""
        wakes_at_bytes = min(missing_bytes, WAKE_BYTES)
        if self._plain_socket is not None and wakes_at_bytes != self._wakes_at_bytes:
            self._plain_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wakes_at_bytes)
            self._wakes_at_bytes = wakes_at_bytes

    def _let_in(self, message: bytes) -> None:
        try:
            welcome = pb.LaneWelcome.FromString(message)
        except DecodeError as error:
            raise LaneLostError(f"no welcome: {error}") from None
        if welcome.code:
            raise LaneLostError(f"bulk stream: {welcome.message}")
        self._welcomed.set_result(None)

    def _end(self, error: Exception) -> None:
        if self._transport is not None:
            self._transport.abort()
        for future in (self._welcomed, self._ended):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen, whoever waits


async def connect(peer: Peer, make: Callable[[], BulkStream]) -> BulkStream:
    """Connects and is let in.

    Raises:
        LaneLostError: it cannot be reached, or does not let us in.
    """
    context = None
    if peer.tls is not None:
        from farfault_cli.tls import client_ssl_context

        context = client_ssl_context(peer.tls)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, stream = await asyncio.get_running_loop().create_connection(make, peer.host, peer.port, ssl=context)
    except (OSError, TimeoutError) as error:
        raise LaneLostError(f"bulk stream to {peer.target}: {error or 'no answer'}") from None
    await stream.greet()
    return stream
