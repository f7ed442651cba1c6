"""One lease on a page server: opens it, keeps its lanes connected, comes back after a loss.

Each lane is kept by a task of its own. A lane that is lost is connected again after a jittered back-off; first
the lease is taken up again, which also checks that the memory is still of the same generation. The lanes'
user is told what was lost and asks for it again, so that nothing is lost and nothing is installed twice.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_cli.errors import FarfaultError, UnreachableError
from farfault_cli.processors import leave_faults_a_processor
from farfault_shim.layout import Layout

from farfault_client.bulk.lane import BulkHost, ProcessLane
from farfault_client.bulk.messages import Target
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.session.answer_watch import AnswerWatch
from farfault_client.session.answers import BadAnswerError
from farfault_client.session.backoff import backoff
from farfault_client.session.express_lane import ExpressLane
from farfault_client.session.grpc_lane import GrpcLane
from farfault_client.session.lane import Lane, LaneDriver, LaneLostError, LaneUser, SessionStats
from farfault_client.session.lease import MESSAGE_BYTES_MAX, PROTOCOL_VERSION, Lease, LeaseKey, Peer, explain

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
WATCH_INTERVAL_S = 1.0
"""Between two looks at how long a lane has been silent."""
BAD_ANSWERS_MAX = 5
"""Answers that break the contract, in a row, before `Session.error` says so; it goes on trying."""
PAGES_MAX = 1 << 31
"""Of one VM: 8 TiB of 4 KiB pages. The pager holds a byte for each."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How to reach the server.

    Attributes:
        peer: its address.
        kind: migration or clone.
        name: for the server's log.
        admission_token: what Open asks for where the server was started with one.
        demand_streams: parallel demand streams over gRPC.
        background_streams: parallel background streams.
        express: use the express lane where the server offers one.
    """

    peer: Peer
    kind: pb.LeaseKind = pb.LEASE_KIND_MIGRATION
    name: str = "farfault"
    admission_token: str = ""
    demand_streams: int = 1
    background_streams: int = 2
    express: bool = True


class Session:
    """A lease and its lanes. `open` first; then `start` lets pages flow; `close` ends all.

    Args:
        config: how to reach the server.
        on_change: called when the connection comes or goes.

    Attributes:
        lease: what was granted; None before `open`.
    """

    def __init__(self, config: SessionConfig, on_change: Callable[[bool], None] = lambda connected: None) -> None:
        self.config = config
        self.stats = SessionStats()
        self.lease: Lease | None = None
        self.opened: pb.OpenResponse | None = None
        self._refusal: FarfaultError | None = None
        self._on_change = on_change
        self._control: grpc.aio.Channel | None = None
        self._drivers: dict[Lane, LaneDriver] = {}
        self._page_lane: tuple[ExpressLane, AnswerWatch] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._open_lock = asyncio.Lock()
        self._opened_at = 0.0
        self._bad_in_a_row = 0
        self._answers_at_bad = 0
        self._shared: SharedPages | None = None
        self._faults: Callable[[], int] = lambda: 0
        self._target: tuple[Target | None, Sequence[int]] = (None, ())
        self._bulk: BulkHost | None = None
        self._ready = {lane: asyncio.Event() for lane in Lane}
        # Connections in a row that carried nothing: every second attempt leaves a lane's own port alone.
        self._fruitless = dict.fromkeys(Lane, 0)

    # ---- control calls ---------------------------------------------------------------------------

    async def open(self, resume: LeaseKey | None = None) -> Lease:
        """Takes a lease, or takes one up again.

        Raises:
            UnreachableError: nobody answers at the target.
            FarfaultError: the server refuses; its reason is the message.
        """
        target = self.config.peer.target
        request = pb.OpenRequest(protocol_version=PROTOCOL_VERSION, kind=self.config.kind, client_name=self.config.name)
        if resume is not None:
            request.resume_lease_id = resume.lease_id
            request.resume_token = resume.token
            request.expected_generation = resume.generation
        token = self.config.admission_token
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        try:
            stub = pages_pb2_grpc.PageServiceStub(self.control_channel())
            response: pb.OpenResponse = await stub.Open(request, metadata=metadata, timeout=OPEN_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise explain(error, target) from error
        if response.protocol_version != PROTOCOL_VERSION:
            raise FarfaultError(
                f"page server {target} speaks protocol {response.protocol_version}, not {PROTOCOL_VERSION}",
                "run the same farfault version on both hosts",
            )
        if resume is not None and resume.generation not in (0, response.generation):
            raise FarfaultError(
                f"page server {target} holds memory of generation {response.generation}, not {resume.generation}",
                "the source VM may have run: pages of the two must not be mixed",
            )
        self.opened = response
        self._take(Lease(response.lease_id, response.token, response.generation, _layout_of(response, target)))
        self.stats.opens += 1
        self._opened_at = asyncio.get_running_loop().time()
        assert self.lease is not None
        return self.lease

    def control_channel(self) -> grpc.aio.Channel:
        """The connection for unary calls."""
        if self._control is None:
            self._control = self.config.peer.channel()
        return self._control

    def lease_metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call but Open."""
        assert self.lease is not None, "open the session first"
        return self.lease.metadata()

    @property
    def key(self) -> LeaseKey:
        """What to keep on disk."""
        assert self.lease is not None, "open the session first"
        return LeaseKey(self.lease.lease_id, self.lease.token, self.lease.generation)

    def expect_generation(self, generation: int) -> None:
        """The memory was frozen: from now on every answer must be of this generation."""
        assert self.lease is not None
        self.lease.generation = generation

    # ---- lanes -----------------------------------------------------------------------------------

    def share_pages(self, shared: SharedPages, faults: Callable[[], int] = lambda: 0) -> None:
        """Before `start`: background lanes run in a process of their own, which puts pages into memory by itself.

        Args:
            shared: the state of every page, which that process looks at; it stays the caller's.
            faults: how many there have been; while there are many, that process leaves them a processor.
        """
        self._shared, self._faults = shared, faults

    def place_into(self, target: Target | None, descriptors: Sequence[int] = ()) -> None:
        """The memory that the background's pages go into from now on; see `BulkHost.place_into`."""
        self._target = (target, descriptors)
        if self._bulk is not None:
            self._bulk.place_into(target, descriptors)

    def start(self, user: LaneUser, lanes: Iterable[Lane] = tuple(Lane)) -> None:
        """Lets pages flow on these lanes, and keeps them flowing over losses, until `close`."""
        create_task = asyncio.get_running_loop().create_task
        for lane in lanes:
            self._tasks.append(create_task(self._keep(lane, user), name=f"{lane.value} lane"))
        if self._shared is not None:
            yielding = leave_faults_a_processor(self._bulk_pid, self._faults)
            self._tasks.append(create_task(yielding, name="leave faults a processor"))

    def pump(self, lane: Lane) -> None:
        """There may be something to send on a lane."""
        driver = self._drivers.get(lane)
        if driver is not None:
            driver.pump()

    @property
    def takes_pages(self) -> bool:
        """`send_pages` may be used now."""
        return self._page_lane is not None

    def send_pages(self, frames: bytes, request_ids: Sequence[int]) -> None:
        """Sends requests for one page each on the demand lane at once; see `ExpressLane.send_pages`."""
        assert self._page_lane is not None
        lane, watch = self._page_lane
        lane.send_pages(frames, len(request_ids))
        watch.pages_sent(request_ids)

    @property
    def connected(self) -> bool:
        """Faults can be fetched now."""
        return Lane.DEMAND in self._drivers

    async def wait_ready(self, timeout_s: float) -> bool:
        """Waits until requests of every lane go out at once, at most so long. Returns whether they do."""
        try:
            async with asyncio.timeout(timeout_s):
                for event in self._ready.values():
                    await event.wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Ends lanes and connections. The lease stays as it is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._bulk is not None:
            self._bulk.close()
            self._bulk = None
        if self._control is not None:
            await self._control.close()
            self._control = None

    @property
    def error(self) -> FarfaultError | None:
        """Why the page server cannot go on; None while it is well or merely out of reach."""
        if self._refusal is None and self._bad_in_a_row > BAD_ANSWERS_MAX and self._answers == self._answers_at_bad:
            return FarfaultError(
                f"{self._bad_in_a_row} answers in a row from {self.config.peer.target} were wrong",
                "nothing wrong was installed; check the link and the page server's log",
            )
        return self._refusal

    @property
    def _answers(self) -> int:
        return sum(stats.answers for stats in self.stats.lanes.values())

    async def _keep(self, lane: Lane, user: LaneUser) -> None:
        waits = backoff(random.random)
        lost_at = -1.0
        while True:
            try:
                await self._reopen(lost_at)
                if await self._run_once(lane, user):
                    waits = backoff(random.random)
            except UnreachableError as error:
                logger.warning("%s", error.problem)
            except FarfaultError as error:
                if self._refusal is None or self._refusal.problem != error.problem:
                    logger.error("%s; faults wait", error)
                self._refusal = error
            except Exception:  # a bug of ours must not leave a guest waiting for a lane that nobody keeps
                logger.exception("%s lane failed; it is connected again", lane.value)
            lost_at = asyncio.get_running_loop().time()
            await asyncio.sleep(next(waits))

    async def _reopen(self, lost_at: float) -> None:
        """Takes the lease up again, unless another lane has done so since the loss."""
        async with self._open_lock:
            if lost_at > self._opened_at:
                await self.open(self.key)
                self._refusal = None

    async def _run_once(self, lane: Lane, user: LaneUser) -> bool:
        """One connection of a lane, from its start to its loss. True: it carried something."""
        stats = self.stats.lanes[lane]
        before = stats.answers
        watch = AnswerWatch(user, asyncio.get_running_loop().time)
        driver = await self._connect(lane, watch)
        stats.connects += 1
        stats.carrier = driver.carrier
        self._drivers[lane] = driver
        if isinstance(driver, ExpressLane):
            self._page_lane = driver, watch
        self._changed(lane)
        try:
            if driver.is_ready:
                self._ready[lane].set()
            driver.pump()
            await _until_silent(driver, lane, watch)
        except grpc.aio.AioRpcError as error:
            raise explain(error, self.config.peer.target) from error
        except BadAnswerError as error:
            stats.bad_answers += 1
            logger.warning("%s lane dropped: %s", lane.value, error)
            self._count_bad_answer()
        except LaneLostError as error:
            logger.warning("%s lane lost: %s", lane.value, error)
        finally:
            del self._drivers[lane]
            if isinstance(driver, ExpressLane):
                self._page_lane = None
            self._ready[lane].clear()
            stats.carrier = ""
            self._changed(lane)
            watch.lane_lost(lane)
            await driver.close()
        carried = stats.answers > before
        self._fruitless[lane] = 0 if carried else self._fruitless[lane] + 1
        return carried

    async def _connect(self, lane: Lane, user: LaneUser) -> LaneDriver:
        assert self.lease is not None
        config, stats = self.config, self.stats.lanes[lane]
        if lane is Lane.BACKGROUND:
            return self._connect_background(user)
        port = self._port(pb.LANE_KIND_EXPRESS)
        if config.express and port:
            try:
                return await ExpressLane.connect(
                    config.peer.at_port(port), self.lease, user, stats, batch_bytes_max=self._batch_bytes_max
                )
            except LaneLostError as error:
                logger.warning("%s; demand goes over gRPC", error)
        return GrpcLane(lane, config.peer, self.lease, user, stats, streams=config.demand_streams)

    def _connect_background(self, user: LaneUser) -> LaneDriver:
        """On a port of its own where there is one; each second fruitless attempt leaves those ports alone."""
        assert self.lease is not None
        config, stats, streams = self.config, self.stats.lanes[Lane.BACKGROUND], self.config.background_streams
        express_port = self._port(pb.LANE_KIND_EXPRESS_BACKGROUND) if config.express else 0
        port = self._port(pb.LANE_KIND_BACKGROUND)
        if self._fruitless[Lane.BACKGROUND] % 2:
            express_port = port = 0
        peer = config.peer.at_port(port) if port else config.peer
        if self._shared is None:
            return GrpcLane(Lane.BACKGROUND, peer, self.lease, user, stats, streams=streams)
        if express_port:
            peer, streams = config.peer.at_port(express_port), 0
        host, on_ready = self._bulk_host(self._shared), self._ready[Lane.BACKGROUND].set
        return ProcessLane(host, peer, self.lease, user, stats, streams=streams, on_ready=on_ready)

    def _port(self, kind: pb.LaneKind) -> int:
        assert self.opened is not None
        return next((lane.port for lane in self.opened.lanes if lane.kind == kind), 0)

    @property
    def _batch_bytes_max(self) -> int:
        assert self.opened is not None
        page_bytes = max(region.page_size_bytes for region in self.opened.regions)
        return max(min(self.opened.limits.max_batch_bytes, MESSAGE_BYTES_MAX), page_bytes)

    def _bulk_host(self, shared: SharedPages) -> BulkHost:
        if self._bulk is None:
            assert self.lease is not None
            self._bulk = BulkHost(shared, self.lease.layout.page_count, self._batch_bytes_max)
            self._bulk.place_into(*self._target)
        return self._bulk

    def _bulk_pid(self) -> int | None:
        return self._bulk.pid if self._bulk is not None else None

    def _take(self, granted: Lease) -> None:
        """Remembers a lease; lanes that run hold the object, so one that is taken up again stays the same."""
        if self.lease is None:
            self.lease = granted
        elif granted.layout != self.lease.layout:
            raise FarfaultError(
                f"page server {self.config.peer.target} now holds {granted.layout} instead of {self.lease.layout}",
                "the guest waits; bring the page server of this VM back at that address",
            )
        else:
            self.lease.lease_id, self.lease.token = granted.lease_id, granted.token
            self.lease.generation = granted.generation

    def _count_bad_answer(self) -> None:
        """In a row over both lanes; a good answer on either ends the row."""
        if self._answers != self._answers_at_bad:
            self._bad_in_a_row, self._answers_at_bad = 0, self._answers
        self._bad_in_a_row += 1
        if self._bad_in_a_row == BAD_ANSWERS_MAX + 1:
            logger.error("%s; faults wait", self.error)

    def _changed(self, lane: Lane) -> None:
        if lane is Lane.DEMAND:
            self._on_change(self.connected)


async def _until_silent(driver: LaneDriver, lane: Lane, watch: AnswerWatch) -> None:
    """Runs a driver to its end. Raises LaneLostError when requests stay unanswered."""
    running = asyncio.ensure_future(driver.run())
    try:
        while not running.done():
            await asyncio.wait({running}, timeout=WATCH_INTERVAL_S)
            complaint = watch.complaint(lane)
            if complaint and not running.done():
                raise LaneLostError(complaint)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    running.result()


def _layout_of(response: pb.OpenResponse, target: str) -> Layout:
    try:
        layout = Layout((region.size_bytes, region.page_size_bytes) for region in response.regions)
    except ValueError as error:
        raise FarfaultError(f"page server {target} describes impossible memory: {error}") from None
    if layout.page_count > PAGES_MAX:
        raise FarfaultError(
            f"page server {target} describes {layout.page_count} pages, more than {PAGES_MAX}",
            "back the memory of so large a VM with huge pages",
        )
    return layout
