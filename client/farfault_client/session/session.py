"""One lease on a page server over gRPC: opens it, keeps its lanes running, comes back after a loss.

The session owns connections and nothing else. What to fetch and what an answer means is its user's:

* `SessionUser.next_request(lane)` is asked for requests whenever the lane may send;
* `SessionUser.answered(lane, answer)` gets every verified answer;
* `SessionUser.connection_lost()` says that whatever was in flight will not be answered.

Demand and background run on connections of their own, so that a fault never waits behind bulk.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import grpc
import grpc.aio
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_cli.errors import FarfaultError, UnreachableError
from farfault_shim.layout import Layout

from farfault_client.session.answers import Answer, BadAnswerError, verify
from farfault_client.session.backoff import backoff

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
MESSAGE_BYTES_MAX = 8 << 20
OPEN_TIMEOUT_S = 10.0
BAD_ANSWERS_MAX = 16
"""Answers that break the contract, in a row, before the session gives up with an error."""
REFUSAL_PAUSE_S = 0.05
"""A refused range is asked for again after this long, so that a refusing server is not hammered."""

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


PageStream = grpc.aio.StreamStreamCall[pb.FetchRequest, pb.PageBatch]


class Lane(Enum):
    """A kind of stream."""

    DEMAND = "demand"
    BACKGROUND = "background"


class SessionUser(Protocol):
    """What a session asks of its user; every method is called on the event loop and must not block."""

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        """The next request to send on a lane; None: nothing now (`Session.wake` asks again)."""

    def answered(self, lane: Lane, answer: Answer, wire_bytes: int) -> None:
        """A verified answer."""

    def connection_lost(self) -> None:
        """Nothing that is in flight will be answered."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as the server granted it; enough to take it up again."""

    lease_id: str
    token: str
    generation: int


@dataclass(slots=True)
class SessionStats:
    """Counters since the start."""

    connects: int = 0
    bad_answers: int = 0
    refusals: int = 0
    bytes_by_lane: dict[Lane, int] = field(default_factory=lambda: dict.fromkeys(Lane, 0))


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How to reach the server.

    Attributes:
        target: ``host:port``.
        kind: migration or clone.
        name: for the server's log.
        demand_streams: parallel demand streams.
        background_streams: parallel background streams.
        credentials: None for plain TCP.
    """

    target: str
    kind: pb.LeaseKind = pb.LEASE_KIND_MIGRATION
    name: str = "farfault"
    demand_streams: int = 1
    background_streams: int = 2
    credentials: grpc.ChannelCredentials | None = None


class Session:
    """A lease and its lanes. `open` first; then `start` lets pages flow; `close` ends all.

    Args:
        config: how to reach the server.
        on_change: called when the connection comes or goes.
    """

    def __init__(self, config: SessionConfig, on_change: Callable[[bool], None] = lambda connected: None) -> None:
        self.config = config
        self.stats = SessionStats()
        self.lease: Lease | None = None
        self.opened: pb.OpenResponse | None = None
        self.connected = False
        self._on_change = on_change
        self._user: SessionUser | None = None
        self._layout: Layout | None = None
        self._control: grpc.aio.Channel | None = None
        self._wakes: dict[Lane, list[asyncio.Event]] = {lane: [] for lane in Lane}
        self._next_wake = dict.fromkeys(Lane, 0)
        self._task: asyncio.Task[None] | None = None
        self._bad_in_a_row = 0

    # ---- control calls ---------------------------------------------------------------------------

    async def open(self, resume: Lease | None = None) -> pb.OpenResponse:
        """Takes the lease, or takes `resume` up again.

        Raises:
            UnreachableError: nobody answers at the target.
            FarfaultError: the server refuses; its reason is the message.
        """
        resume = resume or self.lease
        request = pb.OpenRequest(protocol_version=PROTOCOL_VERSION, kind=self.config.kind, client_name=self.config.name)
        if resume is not None:
            request.resume_lease_id = resume.lease_id
            request.resume_token = resume.token
            request.expected_generation = resume.generation
        stub = pages_pb2_grpc.PageServiceStub(self.control_channel())
        try:
            response: pb.OpenResponse = await stub.Open(request, timeout=OPEN_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise explain(error, self.config.target) from error
        if response.protocol_version != PROTOCOL_VERSION:
            raise FarfaultError(
                f"page server {self.config.target} speaks protocol {response.protocol_version}, not {PROTOCOL_VERSION}",
                "run the same farfault version on both hosts",
            )
        self.opened = response
        self.lease = Lease(response.lease_id, response.token, response.generation)
        return response

    def control_channel(self) -> grpc.aio.Channel:
        """The connection for unary calls."""
        if self._control is None:
            self._control = self._channel()
        return self._control

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call but Open."""
        assert self.lease is not None, "open the session first"
        return (("farfault-lease", self.lease.lease_id), ("authorization", f"Bearer {self.lease.token}"))

    # ---- lanes -----------------------------------------------------------------------------------

    def start(self, user: SessionUser, layout: Layout) -> None:
        """Lets pages flow, and keeps them flowing over losses, until `close`."""
        self._user, self._layout = user, layout
        self._task = asyncio.create_task(self._run(), name="page session")

    def wake(self, lane: Lane) -> None:
        """There may be something to send on a lane."""
        wakes = self._wakes[lane]
        if wakes:
            index = self._next_wake[lane] % len(wakes)
            self._next_wake[lane] = index + 1
            wakes[index].set()

    async def close(self) -> None:
        """Ends lanes and connections. The lease stays as it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._control is not None:
            await self._control.close()
            self._control = None

    async def wait_failed(self) -> None:
        """Returns never while the session lives; raises what ended it for good."""
        assert self._task is not None
        await asyncio.shield(self._task)

    def _channel(self) -> grpc.aio.Channel:
        if self.config.credentials is not None:
            return grpc.aio.secure_channel(self.config.target, self.config.credentials, options=list(CHANNEL_OPTIONS))
        return grpc.aio.insecure_channel(self.config.target, options=list(CHANNEL_OPTIONS))

    async def _run(self) -> None:
        assert self._user is not None
        waits = backoff(random.random)
        first = True
        while True:
            try:
                if not first:
                    await self.open()
                first = False
                await self._run_lanes()
                waits = backoff(random.random)
            except UnreachableError as error:
                logger.warning("%s", error.problem)
            await asyncio.sleep(next(waits))

    async def _run_lanes(self) -> None:
        """Runs all lanes until one fails."""
        assert self._user is not None
        counts = {Lane.DEMAND: self.config.demand_streams, Lane.BACKGROUND: self.config.background_streams}
        channels = {lane: self._channel() for lane in Lane}
        self.stats.connects += 1
        self._set_connected(True)
        try:
            async with asyncio.TaskGroup() as group:
                for lane, count in counts.items():
                    stub = pages_pb2_grpc.PageServiceStub(channels[lane])
                    call = stub.Demand if lane is Lane.DEMAND else stub.Background
                    for _ in range(count):
                        stream = call(metadata=self.metadata())
                        wake = asyncio.Event()
                        wake.set()
                        self._wakes[lane].append(wake)
                        group.create_task(self._send(lane, stream, wake))
                        group.create_task(self._receive(lane, stream))
        except* grpc.aio.AioRpcError as errors:
            first = errors.exceptions[0]
            assert isinstance(first, grpc.aio.AioRpcError)
            error = explain(first, self.config.target)
            logger.warning("lost the page server: %s", error.problem)
            if not isinstance(error, UnreachableError):
                raise error from first
        except* (BadAnswerError, asyncio.InvalidStateError, _StreamEndedError) as errors:
            logger.warning("connection dropped: %s", errors.exceptions[0])
        finally:
            for wakes in self._wakes.values():
                wakes.clear()
            self._set_connected(False)
            self._user.connection_lost()
            for channel in channels.values():
                await channel.close()
        if self._bad_in_a_row > BAD_ANSWERS_MAX:
            raise FarfaultError(
                f"{self._bad_in_a_row} answers in a row from {self.config.target} were wrong",
                "the guest waits and nothing was installed; check the link and the page server's log",
            )

    async def _send(self, lane: Lane, stream: PageStream, wake: asyncio.Event) -> None:
        assert self._user is not None
        while True:
            await wake.wait()
            wake.clear()
            while (request := self._user.next_request(lane)) is not None:
                await stream.write(request)

    async def _receive(self, lane: Lane, stream: PageStream) -> None:
        assert self._user is not None
        assert self._layout is not None
        assert self.lease is not None
        while True:
            batch = await stream.read()
            if batch is grpc.aio.EOF or not isinstance(batch, pb.PageBatch):
                raise _StreamEndedError(f"the page server ended the {lane.value} stream")
            try:
                answer = verify(batch, self._layout, self.lease.generation)
            except BadAnswerError:
                self.stats.bad_answers += 1
                self._bad_in_a_row += 1
                raise
            self._bad_in_a_row = 0
            wire_bytes = batch.ByteSize()
            self.stats.bytes_by_lane[lane] += wire_bytes
            if answer.refusals:
                self.stats.refusals += 1
                logger.warning("page server refused: %s", ", ".join(sorted(set(answer.refusals))))
                await asyncio.sleep(REFUSAL_PAUSE_S)
            self._user.answered(lane, answer, wire_bytes)

    def _set_connected(self, connected: bool) -> None:
        self.connected = connected
        self._on_change(connected)


class _StreamEndedError(Exception):
    """The server ended a stream without an error."""


def explain(error: grpc.aio.AioRpcError, target: str) -> FarfaultError:
    """What a gRPC status means to a user."""
    details = error.details() or error.code().name
    if error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    ):
        return UnreachableError(
            f"page server {target} does not answer: {details}",
            "check that `farfault serve` runs there, the address, and the firewall",
        )
    problem, _, remedy = details.partition("\n  remedy: ")
    return FarfaultError(f"page server {target}: {problem} ({error.code().name})", remedy)
