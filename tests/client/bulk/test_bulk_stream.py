"""Frames of an express background lane go straight into slots, and nothing unverified leaves them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from farfault.checksum import batch_checksum
from farfault.codec import encode_batch
from farfault.v1 import pages_pb2 as pb
from farfault_client.bulk.ring import SLOTS, SlotRing, make_memory
from farfault_client.bulk.stream import BulkStream, SlotAnswer, connect
from farfault_client.session.answers import BadAnswerError
from farfault_client.session.frames import LENGTH
from farfault_client.session.lane import LaneLostError
from farfault_client.session.lease import Lease, Peer
from farfault_shim.layout import Layout

PAGE = 4096
SLOT_BYTES = 64 << 10
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
    """A bulk stream with its ring."""

    def __init__(self) -> None:
        memory = make_memory(SLOT_BYTES)
        self.ring = SlotRing(memory, SLOT_BYTES)
        os.close(memory)
        self.free = list(range(SLOTS))
        self.answers: asyncio.Queue[SlotAnswer] = asyncio.Queue()
        self.stream: BulkStream | None = None

    def make(self) -> BulkStream:
        take: Callable[[], int | None] = lambda: self.free.pop() if self.free else None  # noqa: E731
        return BulkStream(LEASE, self.ring, take, self.free.append, self.answers.put_nowait)

    async def answer(self) -> SlotAnswer:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.answers.get()

    def pages(self, answer: SlotAnswer) -> bytes:
        offset = answer.batch.data_offset
        return bytes(self.ring.slot(answer.slot).view[offset : offset + answer.batch.data_length])


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
        answer = await client.answer()
        assert client.pages(answer) == bytes([5]) * 15 * PAGE
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
        assert [list(answer.batch.header.done_request_ids) for answer in answers] == [[1], [2], [3]]


async def test_without_a_free_slot_it_waits() -> None:
    server = Server()
    async with connected(server) as client:
        client.free[:] = [4]
        for number in range(1, 4):
            server.send(frame(number, 1, done=number, fill=number))
        for number in range(1, 4):
            answer = await client.answer()
            assert answer.slot == 4
            assert client.pages(answer)[0] == number
            assert client.answers.empty()
            client.free.append(answer.slot)
            assert client.stream is not None
            client.stream.slot_freed()


@pytest.mark.parametrize("place", [0.3, 0.99])
async def test_a_damaged_frame_ends_it_and_leaves_no_slot_behind(place: float) -> None:
    server = Server()
    async with connected(server) as client:
        bad = bytearray(frame(3, 8))
        bad[int(place * (len(bad) - 1))] ^= 1
        server.send(bytes(bad))
        with pytest.raises(BadAnswerError):
            await ended(client)
        assert sorted(client.free) == list(range(SLOTS))
        assert client.answers.empty()


async def test_memory_of_another_generation_is_refused() -> None:
    server = Server()
    async with connected(server) as client:
        server.send(frame(3, 1, generation=GENERATION + 1))
        with pytest.raises(BadAnswerError, match="generation"):
            await ended(client)


@pytest.mark.parametrize("length", [0, SLOT_BYTES + 1, 0xFFFF_FFFF])
async def test_a_length_that_cannot_be_ends_it(length: int) -> None:
    server = Server()
    async with connected(server) as client:
        server.send(LENGTH.pack(length))
        with pytest.raises(BadAnswerError, match="frame of"):
            await ended(client)


async def test_a_connection_that_ends_in_the_middle_gives_its_slot_back() -> None:
    server = Server()
    async with connected(server) as client:
        server.send(frame(3, 8)[:-1])
        assert server.writer is not None
        server.writer.close()
        with pytest.raises(LaneLostError):
            await ended(client)
        assert sorted(client.free) == list(range(SLOTS))


async def test_a_refusal_has_the_server_s_words() -> None:
    with pytest.raises(LaneLostError, match="wrong token"):
        async with connected(Server(pb.LaneWelcome(code=7, message="wrong token"))):
            pass


async def test_nobody_there() -> None:
    client = Client()
    with pytest.raises(LaneLostError, match="bulk stream"):
        await connect(Peer("127.0.0.1:1"), client.make)
