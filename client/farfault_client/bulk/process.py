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
from farfault_cli.helper_process import end_with_parent
from farfault_cli.runtime import keep_freed_memory
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
from farfault_client.session.answers import BadAnswerError
from farfault_client.session.grpc_lane import METHODS, read_answer
from farfault_client.session.lane import Lane, LaneLostError
from farfault_client.session.lease import Lease, Peer, explain


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
        self._lease: Lease | None = None
        self._carrying: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until the receiver is gone."""
        loop = asyncio.get_running_loop()
        while packet := await loop.sock_recv(self._socket, MESSAGE_BYTES_MAX):
            payload = packet[1:]
            match packet[0]:
                case MessageType.REQUEST:
                    assert self._lease is not None
                    (self._lease.generation,) = REQUEST_HEAD.unpack_from(payload)
                    self._requests.put_nowait(payload[REQUEST_HEAD.size :])
                case MessageType.FREE:
                    self._free.put_nowait(SLOT.unpack(payload)[0])
                case MessageType.CONNECT:
                    await self._stop()
                    connect = Connect.unpack(payload)
                    layout = Layout(connect.regions)
                    self._lease = Lease(connect.lease_id, connect.token, connect.generation, layout)
                    self._carrying = loop.create_task(self._carry(connect, self._lease))
        await self._stop()

    async def _stop(self) -> None:
        if self._carrying is not None:
            self._carrying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._carrying
        while not self._requests.empty():
            self._requests.get_nowait()

    async def _carry(self, connect: Connect, lease: Lease) -> None:
        credentials, tls = None, None
        if connect.tls:
            from farfault_cli.tls import channel_credentials

            tls = Path(connect.tls)
            credentials = channel_credentials(tls)
        peer = Peer(connect.target, credentials, tls)
        channel = peer.channel()
        call: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
        call = channel.stream_stream(METHODS[Lane.BACKGROUND], request_serializer=None, response_deserializer=None)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(connect.streams):
                    stream = call(metadata=lease.metadata())
                    group.create_task(self._send(stream))
                    group.create_task(self._receive(stream, lease))
        except BaseExceptionGroup as errors:
            await self._report(errors, connect.target)
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
            decoded, answer = read_answer(raw, lease)
            slot = NO_SLOT
            if decoded.data_length:
                if decoded.data_length > self._ring.slot_bytes:
                    raise BadAnswerError(f"a batch of {decoded.data_length} bytes")
                slot = await self._free.get()
            try:
                if slot != NO_SLOT:
                    self._ring.slot(slot).view[: decoded.data_length] = decoded.data
                header = decoded.header
                header.ClearField("data")
                head = ANSWER_HEAD.pack(slot, decoded.data_length, len(raw))
                del answer, raw
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
    descriptor, ring_descriptor, slot_bytes = map(int, sys.argv[1:4])
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(False)
    asyncio.run(BulkProcess(connection, SlotRing(ring_descriptor, slot_bytes)).run())


if __name__ == "__main__":
    main()
