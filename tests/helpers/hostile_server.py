"""Page servers that lie: they know the lease, and every answer of theirs breaks the contract in one way."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, Self

import grpc
from farfault.checksum import checksum_of
from farfault.v1 import pages_pb2 as pb

PAGE_BYTES = 4096
POLL_S = 0.05
Answer = Callable[[pb.FetchRequest, int], Iterator[bytes]]
"""From a request and the memory's generation to messages of the answer."""


def _batch(
    request: pb.FetchRequest, generation: int, kind: int, page_bytes: int = PAGE_BYTES, **changes: Any
) -> pb.PageBatch:
    """What would be a right answer of pages full of 0xEE, but for the changes."""
    extents = [pb.Extent(region=r.region, first_page=r.first_page, page_count=r.page_count) for r in request.ranges]
    for extent in extents:
        extent.kind = kind  # type: ignore[assignment]
    is_data = kind == pb.EXTENT_KIND_DATA
    data = b"\xee" * (sum(extent.page_count for extent in extents) * page_bytes) if is_data else b""
    fields: dict[str, Any] = {
        "done_request_ids": [request.request_id],
        "extents": extents,
        "data": data,
        "generation": generation,
    }
    batch = pb.PageBatch(**(fields | changes))
    if "checksum" not in changes:
        batch.checksum = checksum_of(batch, batch.data)
    return batch


def wrong_checksum(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield _batch(request, generation, pb.EXTENT_KIND_DATA, checksum=7).SerializeToString()


def wrong_generation(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield _batch(request, generation + 1, pb.EXTENT_KIND_DATA).SerializeToString()


def wrong_length(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield _batch(request, generation, pb.EXTENT_KIND_DATA, page_bytes=PAGE_BYTES - 1).SerializeToString()


def pages_past_the_end(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    extents = [pb.Extent(first_page=0, page_count=1 << 40, kind=pb.EXTENT_KIND_ZERO)]
    yield _batch(request, generation, pb.EXTENT_KIND_ZERO, extents=extents).SerializeToString()


def no_such_region(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    extents = [pb.Extent(region=9, first_page=0, page_count=1, kind=pb.EXTENT_KIND_ZERO)]
    yield _batch(request, generation, pb.EXTENT_KIND_ZERO, extents=extents).SerializeToString()


def endless_zero_runs(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    extents = [pb.Extent(first_page=0, page_count=1, kind=pb.EXTENT_KIND_ZERO)] * 20_000
    yield _batch(request, generation, pb.EXTENT_KIND_ZERO, extents=extents).SerializeToString()


def endless_done(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    ids = list(range(100_000))
    yield _batch(request, generation, pb.EXTENT_KIND_ZERO, extents=[], done_request_ids=ids).SerializeToString()


def no_message(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield b"\xff" * 1000


def huge_message(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield bytes(9 << 20)


def close_stream(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    return iter(())


def unknown_status(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield _batch(request, generation, 99).SerializeToString()


def pages_left_out(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield _batch(request, generation, pb.EXTENT_KIND_ZERO, extents=[]).SerializeToString()


def never_answer(request: pb.FetchRequest, generation: int) -> Iterator[bytes]:
    yield from ()


BROKEN: Sequence[Answer] = (
    wrong_checksum,
    wrong_generation,
    wrong_length,
    pages_past_the_end,
    no_such_region,
    endless_zero_runs,
    endless_done,
    no_message,
)
"""Each answer is found out: the receiver says how many were wrong."""
REFUSING: Sequence[Answer] = (unknown_status, pages_left_out)
"""Well-formed, and of no use: the receiver says that pages are refused."""
MUTE: Sequence[Answer] = (never_answer, close_stream, huge_message)
"""There is nothing to find out but that no page comes."""


class HostileServer:
    """A page server on a port of the honest one. A context manager.

    Args:
        port: of gRPC.
        opened: what Open answers: the honest server's lease, regions and limits.
        answer: what it does to a fetch.
        lanes: that Open names.
    """

    def __init__(
        self, port: int, opened: pb.OpenResponse, answer: Answer, lanes: Sequence[pb.LaneAddress] = ()
    ) -> None:
        self.requests = 0
        self._answer = answer
        self._opened = pb.OpenResponse()
        self._opened.CopyFrom(opened)
        del self._opened.lanes[:]
        self._opened.lanes.extend(lanes)
        self._ended = threading.Event()
        stream = grpc.stream_stream_rpc_method_handler(self._fetch)
        handlers = {
            "Open": grpc.unary_unary_rpc_method_handler(lambda request, context: self._opened.SerializeToString()),
            "Demand": stream,
            "Background": stream,
        }
        self._server = grpc.server(
            futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0)]
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("farfault.v1.PageService", handlers),)
        )
        self._server.add_insecure_port(f"127.0.0.1:{port}")

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.stop(None).wait(10)

    def _fetch(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for raw in requests:
            self.requests += 1
            messages = list(self._answer(pb.FetchRequest.FromString(raw), self._opened.generation))
            yield from messages
            if self._answer is close_stream:
                return
        while context.is_active() and not self._ended.wait(POLL_S):
            continue


class HostileExpress:
    """A plain stream that lets everybody in and then sends what it likes. A context manager.

    Args:
        port: to listen on.
        flood: what follows the welcome, again and again.
    """

    def __init__(self, port: int, flood: bytes) -> None:
        self._listening = socket.create_server(("127.0.0.1", port))
        self._listening.settimeout(POLL_S)
        self._flood = flood
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self.connections = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)
        self._listening.close()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listening.accept()
            except TimeoutError:
                continue
            self.connections += 1
            with connection:
                connection.settimeout(POLL_S)
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        try:
            connection.recv(4096)
            welcome = pb.LaneWelcome().SerializeToString()
            connection.sendall(struct.pack("<I", len(welcome)) + welcome)
            for _ in itertools.takewhile(lambda _: not self._ended.is_set(), itertools.count()):
                connection.sendall(self._flood)
                time.sleep(0)
        except OSError:
            return
