"""Bulk without gRPC: each frame of an express background lane is received straight into a slot of the ring.

Nothing copies the pages between the kernel's socket and guest memory: the checksum is taken where they lie, and the
receiver installs them from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple, cast

from farfault.codec import DecodedBatch, decode_view
from farfault.v1 import pages_pb2 as pb
from google.protobuf.message import DecodeError

from farfault_client.bulk.ring import SlotRing
from farfault_client.session.answers import BadAnswerError, verify
from farfault_client.session.frames import LENGTH, frame, hello
from farfault_client.session.lane import LaneLostError
from farfault_client.session.lease import Lease, Peer

CONNECT_TIMEOUT_S: Final = 10.0
WELCOME_BYTES_MAX: Final = 4096


class SlotAnswer(NamedTuple):
    """A verified answer in a slot.

    Attributes:
        slot: of the ring.
        batch: its header, and where in the slot its data lie.
        wire_bytes: of its frame.
    """

    slot: int
    batch: DecodedBatch
    wire_bytes: int


class BulkStream(asyncio.BufferedProtocol):
    """One connection; make it with `connect`.

    Args:
        lease: whose pages.
        ring: where frames go.
        take_slot: a free slot, or None: then reading pauses until `slot_freed`.
        on_answer: gets every verified answer; the slot is its owner's from then on.
        give_back: takes a slot that was taken and not passed on.
    """

    def __init__(
        self,
        lease: Lease,
        ring: SlotRing,
        take_slot: Callable[[], int | None],
        give_back: Callable[[int], None],
        on_answer: Callable[[SlotAnswer], None],
    ) -> None:
        self._lease = lease
        self._ring = ring
        self._take_slot = take_slot
        self._give_back = give_back
        self._on_answer = on_answer
        self._transport: asyncio.Transport | None = None
        self._head = bytearray(LENGTH.size)
        self._head_view = memoryview(self._head)
        self._received = 0
        self._frame_bytes = 0  # 0: the length is being received
        self._slot: int | None = None
        self._target = self._head_view
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
        """Sends a frame."""
        assert self._transport is not None
        self._transport.write(frame(message))

    def slot_freed(self) -> None:
        """There may be a free slot again."""
        if self._frame_bytes and self._slot is None and self._transport is not None and self._begin_body():
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

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(LaneLostError(f"bulk stream: {exc or 'the page server closed it'}"))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self._received :]

    def buffer_updated(self, nbytes: int) -> None:
        self._received += nbytes
        if self._received < len(self._target) or self._ended.done():
            return
        try:
            if self._frame_bytes:
                self._frame()
            else:
                self._begin_frame()
        except (BadAnswerError, LaneLostError) as error:
            self._end(error)

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
        if not 0 < self._frame_bytes <= self._ring.slot_bytes:
            raise BadAnswerError(f"a frame of {self._frame_bytes} bytes, the limit is {self._ring.slot_bytes}")
        if not self._begin_body():
            assert self._transport is not None
            self._transport.pause_reading()

    def _begin_body(self) -> bool:
        """False: there is no free slot."""
        self._slot = self._take_slot()
        if self._slot is None:
            return False
        self._target = self._ring.slot(self._slot).view[: self._frame_bytes]
        self._received = 0
        return True

    def _frame(self) -> None:
        body, slot, frame_bytes = self._target, self._slot, self._frame_bytes
        self._target, self._received, self._frame_bytes, self._slot = self._head_view, 0, 0, None
        if not self._welcomed.done():
            self._let_in(bytes(body))
            return
        assert slot is not None
        try:
            batch = decode_view(body)
            verify(batch, self._lease.layout, self._lease.generation)
        except (DecodeError, BadAnswerError) as error:
            self._give_back(slot)
            raise BadAnswerError(str(error)) from None
        self._on_answer(SlotAnswer(slot, batch, LENGTH.size + frame_bytes))

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
        if self._slot is not None:
            self._give_back(self._slot)
            self._slot = None
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
