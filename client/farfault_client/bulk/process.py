"""The bulk process: carries the background lane, verifies every answer, puts its pages into guest memory.

Started by `farfault_client.bulk.lane` as ``python -m farfault_client.bulk.process SOCKET SHARED PAGES FRAME_BYTES``;
the first two are inherited descriptors. It ends when the receiver closes the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Final

import grpc.aio
import uvloop
from farfault.codec import DecodedBatch
from farfault_cli.helper_process import end_with_parent
from farfault_cli.runtime import be_bulk, keep_freed_memory
from farfault_shim.install.installer import InstallError
from farfault_shim.layout import Layout, PageRun
from farfault_shim.uffd.userfaultfd import MappedBytes

from farfault_client.bulk.messages import (
    DESCRIPTORS_MAX,
    MESSAGE_BYTES_MAX,
    REQUEST_HEAD,
    Connect,
    MessageType,
    Target,
    pack_placed,
)
from farfault_client.bulk.placer import Placer
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.bulk.stream import BulkStream, StreamAnswer
from farfault_client.bulk.stream import connect as connect_bulk
from farfault_client.engine import ExtentResult
from farfault_client.session.answers import Answer, BadAnswerError, Placement
from farfault_client.session.grpc_lane import METHODS, read_answer
from farfault_client.session.lane import Lane, LaneLostError
from farfault_client.session.lease import Lease, Peer, explain

PACKETS_PER_WAKEUP_MAX: Final = 64
"""Packets of the receiver's that are taken in one go."""
REPORTS_WAITING_MAX: Final = 64
"""Packets that the receiver has yet to take; then no more answers are read, and the network waits."""


class BulkProcess:
    """One connection at a time; see the module.

    Args:
        connection: to the receiver.
        shared: its page states.
        frame_bytes_max: of an answer.
    """

    def __init__(self, connection: socket.socket, shared: SharedPages, frame_bytes_max: int) -> None:
        self._socket = connection
        self._shared = shared
        self._buffer = MappedBytes.allocate(frame_bytes_max)
        self._placer: Placer | None = None
        self._requests: asyncio.Queue[bytes] = asyncio.Queue()
        self._reports: deque[bytes] = deque()
        self._reported = asyncio.Event()
        self._reported.set()
        self._stream: BulkStream | None = None
        self._lease: Lease | None = None
        self._carrying: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()

    async def run(self) -> None:
        """Until the receiver is gone."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._socket.fileno(), self._readable)
        await self._gone.wait()
        loop.remove_reader(self._socket.fileno())
        await self._stop()

    def _readable(self) -> None:
        for _ in range(PACKETS_PER_WAKEUP_MAX):
            descriptors: list[int] = []
            try:
                packet, descriptors, _, _ = socket.recv_fds(self._socket, MESSAGE_BYTES_MAX, DESCRIPTORS_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._gone.set()
                return
            self._told(packet[0], packet[1:], descriptors)

    def _told(self, kind: int, payload: bytes, descriptors: list[int]) -> None:
        if kind == MessageType.REQUEST:
            assert self._lease is not None
            (self._lease.generation,) = REQUEST_HEAD.unpack_from(payload)
            request = payload[REQUEST_HEAD.size :]
            if self._stream is not None:
                self._stream.send(request)
            else:
                self._requests.put_nowait(request)
        elif kind == MessageType.TARGET:
            if self._placer is not None:
                self._placer.close()
            target = Target.unpack(payload)
            self._placer = Placer(target, descriptors, self._shared) if target is not None else None
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
            self._report_loss(errors, connect.target)

    # ---- frames on a plain stream ----------------------------------------------------------------

    async def _carry_express(self, peer: Peer, lease: Lease) -> None:
        stream = await connect_bulk(peer, lambda: BulkStream(lease, self._buffer, self._stream_answered))
        try:
            while not self._requests.empty():
                stream.send(self._requests.get_nowait())
            self._stream = stream
            self._post(bytes([MessageType.CONNECTED]))
            await stream.run()
        finally:
            self._stream = None
            stream.close()

    def _stream_answered(self, came: StreamAnswer) -> None:
        self._place(came.batch, came.answer, self._buffer, came.wire_bytes)
        if len(self._reports) > REPORTS_WAITING_MAX and self._stream is not None:
            self._stream.pause()
        # The event loop comes back here for as long as bytes wait. Requests that waited for the end of such a burst
        # would come to the page server together, and their answers back as the next burst, with a gap before it.
        self._readable()

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
                self._post(bytes([MessageType.CONNECTED]))
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
            batch, answer = read_answer(raw, lease)
            assert isinstance(batch.buffer, bytes)
            try:
                self._place(batch, answer, batch.buffer, len(raw))
            except InstallError as error:
                raise LaneLostError(str(error)) from None
            await self._reported.wait()

    # ---- into memory, and to the receiver --------------------------------------------------------

    def _place(self, batch: DecodedBatch, answer: Answer, data: bytes | MappedBytes, wire_bytes: int) -> None:
        """Puts the pages of an answer into memory, and tells the receiver.

        Raises:
            InstallError: not all of them could be.
        """
        placements: list[Placement] = []
        others: list[tuple[PageRun, int]] = []
        data_pages, offset = 0, answer.data_offset
        done: tuple[int, ...] = ()
        try:
            for wire, (run, result) in zip(batch.header.extents, answer.extents, strict=True):
                if result is not ExtentResult.DATA:
                    others.append((run, int(wire.kind)))
                    continue
                data_pages += run.count
                if self._placer is not None:
                    self._placer.place(run, data, offset, placements)
                offset += run.count * self._page_bytes(run)
            done = answer.done
        finally:
            clipped = data_pages - sum(run.count for run, _, _ in placements)
            server_us = (answer.server_queue_us, answer.server_read_us)
            for packet in pack_placed(wire_bytes, server_us, clipped, done, placements, others):
                self._post(packet)

    def _page_bytes(self, run: PageRun) -> int:
        assert self._lease is not None
        return self._lease.layout.region_of_page(run.first).page_size_bytes

    def _post(self, packet: bytes) -> None:
        """Sends a packet, as soon as the receiver takes those before it."""
        self._reports.append(packet)
        if len(self._reports) == 1:
            self._send_reports()

    def _send_reports(self) -> None:
        loop = asyncio.get_running_loop()
        while self._reports:
            try:
                self._socket.send(self._reports[0])
            except BlockingIOError:
                self._reported.clear()
                loop.add_writer(self._socket.fileno(), self._send_reports)
                return
            except OSError:  # the receiver is gone, which `run` notices
                self._reports.clear()
                break
            self._reports.popleft()
        if not self._reported.is_set():
            loop.remove_writer(self._socket.fileno())
            self._reported.set()
            if self._stream is not None:
                self._stream.resume()

    def _report_loss(self, errors: BaseException, target: str) -> None:
        error = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        text = explain(error, target).problem if isinstance(error, grpc.aio.AioRpcError) else str(error)
        bad = isinstance(error, BadAnswerError)
        self._post(bytes([MessageType.LOST, bad]) + text.encode()[:4096])


def main() -> None:
    """Entry point of the child process."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the receiver's to handle
    keep_freed_memory()
    be_bulk()
    descriptor, shared, page_count, frame_bytes_max = map(int, sys.argv[1:5])
    connection = socket.socket(fileno=descriptor)
    connection.setblocking(False)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(connection, SharedPages(page_count, shared), frame_bytes_max))


async def _run(connection: socket.socket, shared: SharedPages, frame_bytes_max: int) -> None:
    await BulkProcess(connection, shared, frame_bytes_max).run()


if __name__ == "__main__":
    main()
