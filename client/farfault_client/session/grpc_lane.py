"""A lane over gRPC: one or several bidirectional streams of a connection of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import grpc.aio
from farfault.codec import DecodedBatch, decode_batch
from farfault.v1 import pages_pb2 as pb
from google.protobuf.message import DecodeError

from farfault_client.session.answers import Answer, BadAnswerError, verify
from farfault_client.session.lane import Lane, LaneLostError, LaneStats, LaneUser
from farfault_client.session.lease import Lease, Peer

PageStream = grpc.aio.StreamStreamCall[pb.FetchRequest, bytes]
METHODS = {Lane.DEMAND: "/farfault.v1.PageService/Demand", Lane.BACKGROUND: "/farfault.v1.PageService/Background"}


class GrpcLane:
    """A `LaneDriver` over gRPC. Connects lazily: a dead peer shows in `run`.

    Args:
        lane: which.
        peer: host, port and credentials.
        lease: whose pages.
        user: see `LaneUser`.
        stats: counted into.
        streams: parallel streams; one message at a time is serialized on each.
    """

    carrier = "grpc"
    is_ready = True

    def __init__(self, lane: Lane, peer: Peer, lease: Lease, user: LaneUser, stats: LaneStats, *, streams: int) -> None:
        self._lane = lane
        self._lease = lease
        self._user = user
        self._stats = stats
        self._channel = peer.channel()
        call: grpc.aio.StreamStreamMultiCallable[pb.FetchRequest, bytes] = self._channel.stream_stream(
            METHODS[lane], request_serializer=pb.FetchRequest.SerializeToString, response_deserializer=None
        )
        self._streams: Sequence[PageStream] = [call(metadata=lease.metadata()) for _ in range(streams)]
        self._wakes = [asyncio.Event() for _ in self._streams]
        self._next = 0

    def pump(self) -> None:
        self._wakes[self._next % len(self._wakes)].set()
        self._next += 1

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for stream, wake in zip(self._streams, self._wakes, strict=True):
                    wake.set()
                    group.create_task(self._send(stream, wake))
                    group.create_task(self._receive(stream))
        except BaseExceptionGroup as errors:
            error = _first(errors)
            if isinstance(error, asyncio.InvalidStateError):  # a write after the stream had ended
                error = LaneLostError(str(error))
            raise error from None

    async def close(self) -> None:
        await self._channel.close()

    async def _send(self, stream: PageStream, wake: asyncio.Event) -> None:
        while True:
            await wake.wait()
            wake.clear()
            while (request := self._user.next_request(self._lane)) is not None:
                await stream.write(request)

    async def _receive(self, stream: PageStream) -> None:
        while True:
            raw = await stream.read()
            if not isinstance(raw, bytes):
                raise LaneLostError(f"the page server ended the {self._lane.value} stream")
            self._stats.wire_bytes += len(raw)
            answer = read_answer(raw, self._lease)[1]
            self._stats.answers += 1
            self._user.answered(self._lane, answer)


def read_answer(raw: bytes, lease: Lease) -> tuple[DecodedBatch, Answer]:
    """Decodes and verifies an answer. Raises BadAnswerError."""
    try:
        batch = decode_batch(raw)
    except DecodeError as error:
        raise BadAnswerError(f"no PageBatch: {error}") from None
    return batch, verify(batch, lease.layout, lease.generation)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
