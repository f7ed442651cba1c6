"""The bulk process: carries the background lane, verifies every answer, lays it into the ring.

Started by `farfault_client.bulk.lane` as ``python -m farfault_client.bulk.process SOCKET RING SLOT_BYTES``; the two
numbers are inherited descriptors. It ends when the receiver closes the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path

import grpc.aio
import uvloop
from farfault.codec import DecodedBatch
from farfault_cli.helper_process import end_with_parent
from farfault_cli.runtime import be_bulk, keep_freed_memory
from farfault_shim.layout import Layout

from farfault_client.bulk.messages import (
    ANSWER_HEAD,
    MESSAGE_BYTES_MAX,
    NO_SLOT,
    REQUEST_HEAD,
    SLOT,
    Connect,
    MessageType,
)
from farfault_client.bulk.ring import SLOTS, SlotRing
from farfault_client.bulk.stream import BulkStream, SlotAnswer
from farfault_client.bulk.stream import connect as connect_bulk
from farfault_client.session.answers import BadAnswerError
from farfault_client.session.grpc_lane import METHODS, read_answer
from farfault_client.session.lane import Lane, LaneLostError
from farfault_client.session.lease import Lease, Peer, explain

PACKETS_PER_WAKEUP_MAX = 64
"""Packets of the receiver's that are taken in one go."""


class BulkProcess:
    """One connection at a time; see the module.

    Args:
        connection: to the receiver.
        ring: where answers go.
    """

    def __init__(self, connection: socket.socket, ring: SlotRing) -> None:
        self._socket = connection
        self._ring = ring
        self._sending = asyncio.Lock()
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(SLOTS):
            self._free.put_nowait(slot)
        self._requests: asyncio.Queue[bytes] = asyncio.Queue()
        self._answers: asyncio.Queue[SlotAnswer] = asyncio.Queue()
        self._stream: BulkStream | None = None
        self._lease: Lease | None = None
        self._carrying: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the receiver is gone."""
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._socket.fileno(), self._readable, gone)
        await gone
        loop.remove_reader(self._socket.fileno())
        await self._stop()

    def _readable(self, gone: asyncio.Future[None]) -> None:
        for _ in range(PACKETS_PER_WAKEUP_MAX):
            try:
                packet = self._socket.recv(MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                _set_once(gone)
                return
            self._told(packet[0], packet[1:])

    def _told(self, kind: int, payload: bytes) -> None:
        if kind == MessageType.REQUEST:
            assert self._lease is not None
            (self._lease.generation,) = REQUEST_HEAD.unpack_from(payload)
            request = payload[REQUEST_HEAD.size :]
            if self._stream is not None:
                self._stream.send(request)
            else:
                self._requests.put_nowait(request)
        elif kind == MessageType.FREE:
            for (slot,) in SLOT.iter_unpack(payload):
                self._free.put_nowait(slot)
            if self._stream is not None:
                self._stream.slot_freed()
        elif kind == MessageType.CONNECT:
            connect = Connect.unpack(payload)
            lease = Lease(connect.lease_id, connect.token, connect.generation, Layout(connect.regions))
            self._lease, self._stream = lease, None
            before, self._carrying = self._carrying, None
            while not self._requests.empty():
                self._requests.get_nowait()
            self._carrying = asyncio.get_running_loop().create_task(self._carry(connect, lease, before))

    async def _stop(self) -> None:
        if self._carrying is not None:
            self._carrying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._carrying

    async def _carry(self, connect: Connect, lease: Lease, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            before.cancel()
            await asyncio.gather(before, return_exceptions=True)
        tls = Path(connect.tls) if connect.tls else None
        try:
            async with asyncio.TaskGroup() as group:
                if connect.is_express:
                    group.create_task(self._carry_express(Peer(connect.target, tls=tls), lease))
                else:
                    group.create_task(self._carry_grpc(connect, lease, tls))
        except BaseExceptionGroup as errors:
            await self._report(errors, connect.target)

    # ---- frames on a plain stream ----------------------------------------------------------------

    async def _carry_express(self, peer: Peer, lease: Lease) -> None:
        stream = await connect_bulk(
            peer,
            lambda: BulkStream(lease, self._ring, self._take_slot, self._free.put_nowait, self._answers.put_nowait),
        )
        try:
            while not self._requests.empty():
                stream.send(self._requests.get_nowait())
            self._stream = stream
            async with asyncio.TaskGroup() as group:
                group.create_task(stream.run())
                group.create_task(self._pass_on())
        finally:
            self._stream = None
            stream.close()
            while not self._answers.empty():
                self._free.put_nowait(self._answers.get_nowait().slot)

    def _take_slot(self) -> int | None:
        return None if self._free.empty() else self._free.get_nowait()

    async def _pass_on(self) -> None:
        while True:
            slot, batch, wire_bytes = await self._answers.get()
            if not batch.data_length:
                self._free.put_nowait(slot)
                slot = NO_SLOT
            await self._answer(slot, batch, wire_bytes)

    # ---- gRPC ------------------------------------------------------------------------------------

    async def _carry_grpc(self, connect: Connect, lease: Lease, tls: Path | None) -> None:
        credentials = None
        if tls is not None:
            from farfault_cli.tls import channel_credentials

            credentials = channel_credentials(tls)
        channel = Peer(connect.target, credentials, tls).channel()
        call: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        call = channel.stream_stream(METHODS[Lane.BACKGROUND], request_serializer=None, response_deserializer=None)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(connect.streams):
                    stream = call(metadata=lease.metadata())
                    group.create_task(self._send(stream))
                    group.create_task(self._receive(stream, lease))
        finally:
            await channel.close()

    async def _send(self, stream: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        while True:
            await stream.write(await self._requests.get())

    async def _receive(self, stream: grpc.aio.StreamStreamCall[bytes, bytes], lease: Lease) -> None:
        while True:
            raw = await stream.read()
            if not isinstance(raw, bytes):
                raise LaneLostError("the page server ended the background stream")
            decoded, _ = read_answer(raw, lease)
            slot = NO_SLOT
            if decoded.data_length:
                if decoded.data_length > self._ring.slot_bytes:
                    raise BadAnswerError(f"a batch of {decoded.data_length} bytes")
                slot = await self._free.get()
                self._ring.slot(slot).view[: decoded.data_length] = decoded.data
            await self._answer(slot, decoded._replace(data_offset=0), len(raw))

    # ---- to the receiver -------------------------------------------------------------------------

    async def _answer(self, slot: int, batch: DecodedBatch, wire_bytes: int) -> None:
        """Passes an answer on, or frees its slot."""
        header = batch.header
        header.ClearField("data")
        head = ANSWER_HEAD.pack(slot, batch.data_offset, batch.data_length, wire_bytes)
        try:
            await self._post(bytes([MessageType.ANSWER]) + head + header.SerializeToString())
        except BaseException:  # not sent: the receiver will never free it
            if slot != NO_SLOT:
                self._free.put_nowait(slot)
            raise

    async def _post(self, packet: bytes) -> None:
        """Sends one packet. An exception, cancellation included, means that it was not sent.

        `loop.sock_sendall` cannot promise that: it may be cancelled between the send and its return, and a slot
        that both sides call free would be overwritten while it is installed.

        Raises:
            BadAnswerError: it is longer than the receiver takes.
        """
        if len(packet) > MESSAGE_BYTES_MAX:
            raise BadAnswerError(f"an answer with {len(packet)} bytes beside its data")
        loop = asyncio.get_running_loop()
        async with self._sending:
            while True:
                try:
                    self._socket.send(packet)
                    return
                except BlockingIOError:
                    writable: asyncio.Future[None] = loop.create_future()
                    loop.add_writer(self._socket.fileno(), _set_once, writable)
                    try:
                        await writable
                    finally:
                        loop.remove_writer(self._socket.fileno())

    async def _report(self, errors: BaseException, target: str) -> None:
        error = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        text = explain(error, target).problem if isinstance(error, grpc.aio.AioRpcError) else str(error)
        bad = isinstance(error, BadAnswerError)
        packet = bytes([MessageType.LOST, bad]) + text.encode()[:4096]
        with contextlib.suppress(OSError):
            await self._post(packet)


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def main() -> None:
    """Entry point of the child process."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the receiver's to handle
    keep_freed_memory()
    be_bulk()
    descriptor, ring_descriptor, slot_bytes = map(int, sys.argv[1:4])
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(connection, ring_descriptor, slot_bytes))


async def _run(connection: socket.socket, ring_descriptor: int, slot_bytes: int) -> None:
    await BulkProcess(connection, SlotRing(ring_descriptor, slot_bytes)).run()


if __name__ == "__main__":
    main()
