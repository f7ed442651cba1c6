"""Frames of an express background lane go into one buffer, and nothing unverified leaves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from farfault.checksum import batch_checksum
from farfault.codec import encode_batch
from farfault.v1 import pages_pb2 as pb
from farfault_client.bulk.stream import BulkStream, StreamAnswer, connect
from farfault_client.session.answers import BadAnswerError
from farfault_client.session.frames import LENGTH
from farfault_client.session.lane import LaneLostError
from farfault_client.session.lease import Lease, Peer
from farfault_shim.install.installer import InstallResult, VmmGone
from farfault_shim.layout import Layout
from farfault_shim.uffd.userfaultfd import MappedBytes

PAGE = 4096
FRAME_BYTES_MAX = 64 << 10
GENERATION = 7
TIMEOUT_S = 10.0
LEASE = Lease("lease", "token", GENERATION, Layout([(1 << 20, PAGE)]))


def frame(first: int, count: int, *, done: int = 1, generation: int = GENERATION, fill: int = 5) -> bytes:
    """A frame with a good batch of `count` pages."""
    data = bytes([fill]) * (count * PAGE)
    extents = [(0, first, count, pb.EXTENT_KIND_DATA)]
    checksum = batch_checksum([done], extents, generation, (data,))
    message = encode_batch([done], extents, checksum, data, generation)
    return LENGTH.pack(len(message)) + message


class Server:
    """Lets clients in, and sends what a test gives it."""

    def __init__(self, welcome: pb.LaneWelcome | None = None) -> None:
        self.welcome = pb.LaneWelcome() if welcome is None else welcome
        self.hello = pb.LaneHello()
        self.requests: asyncio.Queue[bytes] = asyncio.Queue()
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.hello = pb.LaneHello.FromString(await self._read(reader))
        message = self.welcome.SerializeToString()
        writer.write(LENGTH.pack(len(message)) + message)
        try:
            while True:
                self.requests.put_nowait(await self._read(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    @staticmethod
    async def _read(reader: asyncio.StreamReader) -> bytes:
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return await reader.readexactly(length)

    def send(self, data: bytes) -> None:
        assert self.writer is not None
        self.writer.write(data)


class Client:
    """A bulk stream, and what it has brought."""

    def __init__(self) -> None:
        self.buffer = MappedBytes.allocate(FRAME_BYTES_MAX)
        self.answers: asyncio.Queue[tuple[StreamAnswer, bytes]] = asyncio.Queue()
        self.error: Exception | None = None
        self.stream: BulkStream | None = None

    def make(self) -> BulkStream:
        return BulkStream(LEASE, self.buffer, self._answered)

    def _answered(self, answer: StreamAnswer) -> None:
        if self.error is not None:
            raise self.error
        offset = answer.batch.data_offset
        self.answers.put_nowait((answer, self.buffer[offset : offset + answer.batch.data_length]))

    async def answer(self) -> tuple[StreamAnswer, bytes]:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.answers.get()


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Client]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    client = Client()
    try:
        client.stream = await connect(Peer(f"127.0.0.1:{port}"), client.make)
        yield client
    finally:
        if client.stream is not None:
            client.stream.close()
        listening.close()


async def ended(client: Client) -> None:
    assert client.stream is not None
    async with asyncio.timeout(TIMEOUT_S):
        await client.stream.run()


async def test_pages_are_where_the_socket_put_them() -> None:
    server = Server()
    async with connected(server) as client:
        assert (server.hello.lease_id, server.hello.token) == ("lease", "token")
        assert client.stream is not None
        client.stream.send(b"a request")
        async with asyncio.timeout(TIMEOUT_S):
            assert await server.requests.get() == b"a request"
        server.send(frame(3, 15, done=9))
        answer, pages = await client.answer()
        assert pages == bytes([5]) * 15 * PAGE
        assert [(run.first, run.count) for run, _ in answer.answer.extents] == [(3, 15)]
        assert list(answer.batch.header.done_request_ids) == [9]
        assert answer.batch.header.data == b""
        assert answer.wire_bytes == len(frame(3, 15, done=9))


async def test_frames_come_in_any_pieces() -> None:
    server = Server()
    async with connected(server) as client:
        frames = frame(0, 1) + frame(1, 2, done=2) + frame(3, 1, done=3)
        for start in range(0, len(frames), 1009):
            server.send(frames[start : start + 1009])
            await asyncio.sleep(0)
        answers = [await client.answer() for _ in range(3)]
        assert [answer.answer.done for answer, _ in answers] == [(1,), (2,), (3,)]


async def test_a_frame_that_comes_in_drops_wakes_it_when_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    update = BulkStream.buffer_updated
    monkeypatch.setattr(BulkStream, "buffer_updated", lambda self, size: (updates.append(size), update(self, size)))
    server = Server()
    async with connected(server) as client:
        updates.clear()
        whole = frame(0, 15)
        for start in range(0, len(whole), 1 << 10):
            server.send(whole[start : start + (1 << 10)])
            await asyncio.sleep(0.001)
        await client.answer()
        assert sum(updates) == len(whole)
        assert len(updates) <= 3, "its length, what had come with that, and the rest"


async def test_it_stands_still_while_it_is_paused() -> None:
    server = Server()
    async with connected(server) as client:
        assert client.stream is not None
        client.stream.pause()
        server.send(frame(1, 1))
        await asyncio.sleep(0.05)
        assert client.answers.empty()
        client.stream.resume()
        await client.answer()


async def test_it_ends_when_its_pages_cannot_be_placed() -> None:
    server = Server()
    async with connected(server) as client:
        client.error = VmmGone("the VMM has exited", InstallResult())
        server.send(frame(1, 1))
        with pytest.raises(LaneLostError, match="the VMM has exited"):
            await ended(client)


@pytest.mark.parametrize("place", [0.3, 0.99])
async def test_a_damaged_frame_ends_it(place: float) -> None:
    server = Server()
    async with connected(server) as client:
        bad = bytearray(frame(3, 8))
        bad[int(place * (len(bad) - 1))] ^= 1
        server.send(bytes(bad))
        with pytest.raises(BadAnswerError):
            await ended(client)
        assert client.answers.empty()


async def test_memory_of_another_generation_is_refused() -> None:
    server = Server()
    async with connected(server) as client:
        server.send(frame(3, 1, generation=GENERATION + 1))
        with pytest.raises(BadAnswerError, match="generation"):
            await ended(client)


@pytest.mark.parametrize("length", [0, FRAME_BYTES_MAX + 1, 0xFFFF_FFFF])
async def test_a_length_that_cannot_be_ends_it(length: int) -> None:
    server = Server()
    async with connected(server) as client:
        server.send(LENGTH.pack(length))
        with pytest.raises(BadAnswerError, match="frame of"):
            await ended(client)


async def test_a_connection_may_end_in_the_middle() -> None:
    server = Server()
    async with connected(server) as client:
        server.send(frame(3, 8)[:-1])
        assert server.writer is not None
        server.writer.close()
        with pytest.raises(LaneLostError):
            await ended(client)


async def test_a_request_that_comes_after_the_end_is_lost_with_it() -> None:
    class Closed:
        """As uvloop's transport."""

        def write(self, data: bytes) -> None:
            raise RuntimeError("the handler is closed")

        def abort(self) -> None: ...

    async with connected(Server()) as client:
        assert client.stream is not None
        client.stream.close()
        client.stream._transport = Closed()  # type: ignore[assignment]
        client.stream.send(b"late")
        with pytest.raises(LaneLostError):
            await ended(client)


async def test_a_refusal_has_the_server_s_words() -> None:
    with pytest.raises(LaneLostError, match="wrong token"):
        async with connected(Server(pb.LaneWelcome(code=7, message="wrong token"))):
            pass


async def test_nobody_there() -> None:
    client = Client()
    with pytest.raises(LaneLostError, match="bulk stream"):
        await connect(Peer("127.0.0.1:1"), client.make)
