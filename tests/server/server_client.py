"""A plain client of the page server for its tests, and servers to talk to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc.aio
from farfault.checksum import checksum_of
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_server.memory.opening import open_ram
from farfault_server.server import PageServer, ServerConfig

PAGE = 4096
TIMEOUT_S = 20.0
LENGTH = struct.Struct("<I")

Metadata = tuple[tuple[str, str], ...]


def page(number: int) -> bytes:
    """A page that names itself; never zero."""
    return (number + 1).to_bytes(4, "little") * (PAGE // 4)


def write_ram(path: Path, pages: Iterable[bytes]) -> Path:
    path.write_bytes(b"".join(pages))
    return path


@contextlib.asynccontextmanager
async def serving(*paths: Path, **options: Any) -> AsyncIterator[PageServer]:
    """A server in this process; `options` are those of ServerConfig, and `store` and `vmm` of PageServer."""
    parts = {name: options.pop(name) for name in ("store", "vmm", "regions") if name in options}
    options.setdefault("background_port", None)
    regions = parts.pop("regions", None) or [open_ram(str(path)) for path in paths]
    server = PageServer(regions, ServerConfig(**options), **parts)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(drain_s=0)


class Client:
    """Calls of one client on one connection."""

    def __init__(self, port: int, credentials: grpc.ChannelCredentials | None = None) -> None:
        target = f"localhost:{port}"
        self.channel = (
            grpc.aio.secure_channel(target, credentials) if credentials else grpc.aio.insecure_channel(target)
        )
        self.pages = pages_pb2_grpc.PageServiceStub(self.channel)
        self.source = pages_pb2_grpc.SourceServiceStub(self.channel)
        self.opened = pb.OpenResponse()

    async def open(self, kind: int = pb.LEASE_KIND_CLONE, metadata: Metadata = (), **fields: Any) -> pb.OpenResponse:
        request = pb.OpenRequest(**{"protocol_version": 1, "kind": kind, "client_name": "test", **fields})
        self.opened = await self.pages.Open(request, timeout=TIMEOUT_S, metadata=metadata)
        return self.opened

    async def resume(self, opened: pb.OpenResponse, generation: int = 0) -> pb.OpenResponse:
        return await self.open(
            resume_lease_id=opened.lease_id, resume_token=opened.token, expected_generation=generation
        )

    @property
    def metadata(self) -> Metadata:
        return (("farfault-lease", self.opened.lease_id), ("authorization", f"Bearer {self.opened.token}"))

    def stream(self, name: str = "Demand", metadata: Metadata | None = None) -> Any:
        call = getattr(self.pages, name)
        return call(metadata=self.metadata if metadata is None else metadata, timeout=TIMEOUT_S)

    async def fetch(self, *ranges: tuple[int, int, int], name: str = "Demand") -> list[bytes | str]:
        """The pages of some ranges, each its bytes or the name of its status, over a stream of its own."""
        stream = self.stream(name)
        await stream.write(request(1, *ranges))
        pages = await collect(stream.read, {1})
        await stream.done_writing()
        return pages

    def lane(self, kind: int) -> int:
        return next(lane.port for lane in self.opened.lanes if lane.kind == kind)

    async def close(self) -> None:
        await self.channel.close()


@contextlib.asynccontextmanager
async def connected(port: int, credentials: grpc.ChannelCredentials | None = None) -> AsyncIterator[Client]:
    client = Client(port, credentials)
    try:
        yield client
    finally:
        await client.close()


def request(request_id: int, *ranges: tuple[int, int, int], priority: int = pb.PRIORITY_VCPU) -> pb.FetchRequest:
    pages = [pb.PageRange(region=region, first_page=first, page_count=count) for region, first, count in ranges]
    return pb.FetchRequest(request_id=request_id, priority=priority, ranges=pages)


async def collect(read: Callable[[], Any], request_ids: set[int]) -> list[bytes | str]:
    """Reads batches until these requests are done; the pages in the order in which they came."""
    pages: list[bytes | str] = []
    waiting = set(request_ids)
    while waiting:
        batch = await asyncio.wait_for(read(), TIMEOUT_S)
        assert batch is not grpc.aio.EOF, "the stream ended early"
        pages += pages_of(batch)
        waiting -= set(batch.done_request_ids)
    return pages


def pages_of(batch: pb.PageBatch) -> list[bytes | str]:
    assert batch.checksum == checksum_of(batch, batch.data)
    pages: list[bytes | str] = []
    offset = 0
    for extent in batch.extents:
        if extent.kind == pb.EXTENT_KIND_DATA:
            end = offset + extent.page_count * PAGE
            pages += [batch.data[start : start + PAGE] for start in range(offset, end, PAGE)]
            offset = end
        elif extent.kind == pb.EXTENT_KIND_ZERO:
            pages += [bytes(PAGE)] * extent.page_count
        else:
            pages.append(pb.ExtentKind.Name(extent.kind).removeprefix("EXTENT_KIND_"))
    assert offset == len(batch.data)
    return pages


class Express:
    """A client of the express lane."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, ssl: Any = None) -> Express:
        return cls(*await asyncio.open_connection("localhost", port, ssl=ssl, family=socket.AF_INET))

    async def hello(self, lease_id: str, token: str, protocol_version: int = 1) -> pb.LaneWelcome:
        self.send(pb.LaneHello(protocol_version=protocol_version, lease_id=lease_id, token=token))
        return pb.LaneWelcome.FromString(await self.frame())

    def send(self, *messages: Any) -> None:
        frames = [message.SerializeToString() for message in messages]
        self.writer.write(b"".join(LENGTH.pack(len(frame)) + frame for frame in frames))

    async def frame(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
            return await self.reader.readexactly(length)

    async def batch(self) -> pb.PageBatch:
        return pb.PageBatch.FromString(await self.frame())

    async def ended(self) -> bool:
        """Waits until the server closes."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self.reader.read() == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.writer.close()


async def eventually(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
    """Polls until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.01)


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    """The status and message with which a call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call was not refused")
