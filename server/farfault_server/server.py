"""The page server as a whole: memory, leases and lanes behind one gRPC port and its side ports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc.aio
from farfault.v1 import pages_pb2 as pb
from farfault_cli.errors import FarfaultError, UsageError
from farfault_cli.processors import leave_faults_a_processor
from farfault_cli.tls import ServerTls
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from farfault_server.background import BackgroundProcess
from farfault_server.express import ExpressListener
from farfault_server.lanes.limits import LaneLimits
from farfault_server.lanes.stats import LaneStats
from farfault_server.lanes.streams import Streams
from farfault_server.leases.book import LeaseBook
from farfault_server.leases.keeper import LeaseKeeper
from farfault_server.leases.phases import Phase
from farfault_server.leases.store import MemoryStore, Store
from farfault_server.listening import CHANNEL_OPTIONS, keep_fresh, listen
from farfault_server.memory import PageRegion, ServedMemory
from farfault_server.rpc.page_service import LEASES_MAX, PageService, ServerStats
from farfault_server.rpc.source_service import SourceService
from farfault_server.source_vm import SourceVmm, VmOwner

logger = logging.getLogger(__name__)

DRAIN_S: Final = 2.0
"""Calls that are under way when the server ends may go on for this long."""
WATCH_INTERVAL_S: Final = 1.0
"""How often the VM, which should stand still, is looked at; at once where its VMM tells of a start, or when it is no
longer held."""
SERVICES: Final = ("farfault.v1.PageService", "farfault.v1.SourceService")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How to serve.

    Attributes:
        host: address to listen on.
        port: of the gRPC port; 0: any.
        leases_max: of both kinds.
        express_port: of the express lane; 0: any; None: no express lane.
        background_port: of the background process; 0: any; None: no such process.
        express_background_port: of bulk without gRPC, in the background process; 0: any; None: not offered.
        tls: directory of the TLS files; None: plain.
        admission_token: what Open needs; None: nothing.
        log_level, json_logs: how the background process logs.
        abandon: takes a suspended VM back from its destination at the start.
    """

    host: str = "127.0.0.1"
    port: int = 0
    express_port: int | None = 0
    background_port: int | None = 0
    express_background_port: int | None = 0
    tls: Path | None = None
    leases_max: int = LEASES_MAX
    admission_token: str | None = None
    log_level: str = "info"
    json_logs: bool = False
    abandon: bool = False


@dataclass(slots=True)
class PageServer:
    """A page server. `start`, then `stop`; the VM is never touched by either, but see `VmOwner.recover`.

    Args:
        regions: the memory; closed by `stop`.
        config: how to serve.
        store: where leases are kept.
        vmm: control of the VMM, where there is one.
    """

    regions: Sequence[PageRegion]
    config: ServerConfig = field(default_factory=ServerConfig)
    store: Store = field(default_factory=MemoryStore)
    vmm: SourceVmm | None = None
    stats: ServerStats = field(default_factory=ServerStats)
    streams: Streams = field(default_factory=Streams)
    port: int = 0
    keeper: LeaseKeeper = field(init=False)
    owner: VmOwner = field(init=False)
    _server: grpc.aio.Server = field(init=False)
    _health: health_aio.HealthServicer = field(init=False)
    _limits: LaneLimits = field(init=False)
    _tls: ServerTls | None = field(init=False)
    background: BackgroundProcess | None = None
    _express: ExpressListener | None = None
    _chores: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Takes the record up, listens, and serves. `port` is bound afterwards.

        Raises:
            UsageError: the address cannot be had.
            FarfaultError: the record and this start do not fit, or the VMM cannot be asked.
        """
        memory = ServedMemory(self.regions)
        self.keeper = LeaseKeeper(self._load_book(), self.store, memory)
        try:
            self.keeper.save_now()
        except OSError as error:
            raise UsageError(
                f"cannot save the lease record: {error}", "make room in, or repair, the --state directory"
            ) from error
        self.keeper.lease_ended = self.streams.end_lease
        self.owner = VmOwner(self.vmm, self.keeper)
        await self.owner.recover(abandon=self.config.abandon)
        self._limits = LaneLimits.for_regions(self.regions)
        self._tls = ServerTls(self.config.tls) if self.config.tls is not None else None
        self._server = self._make_server()
        self.port = listen(self._server, self.config.host, self.config.port, self._tls)
        await self._start_express()
        await self._start_background()
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        if self.vmm is not None:
            self._chores.append(asyncio.create_task(self._watch_vm(), name="watch VM"))

    async def _start_express(self) -> None:
        if self.config.express_port is None:
            return
        self._express = ExpressListener(self.keeper, self._limits, self.streams, self.stats.express)
        context = self._tls.ssl_context if self._tls is not None else None
        await self._express.start(self.config.host, self.config.express_port, context)
        if self._tls is not None:
            self._chores.append(asyncio.create_task(keep_fresh(self._tls), name="refresh TLS"))

    async def _start_background(self) -> None:
        if self.config.background_port is None:
            return
        self.background = BackgroundProcess(
            self.keeper,
            self.config.host,
            self.config.background_port,
            self.config.express_background_port,
            self.config.tls,
            log_level=self.config.log_level,
            json_logs=self.config.json_logs,
        )
        self.keeper.publish = self.background.publish
        await self.background.start()
        yielding = leave_faults_a_processor(self._background_pid, self._faults)
        self._chores.append(asyncio.create_task(yielding, name="leave faults a processor"))

    def _background_pid(self) -> int | None:
        return self.background.pid if self.background is not None and self.background.is_up else None

    def _faults(self) -> int | None:
        lanes = (self.stats.demand, self.stats.express)
        return sum(lane.faults for lane in lanes) if any(lane.streams for lane in lanes) else None

    def _load_book(self) -> LeaseBook:
        identity = [region.identity() for region in self.regions]
        book = self.store.load()
        is_controlled = self.vmm is not None
        if book is None:
            return LeaseBook.fresh(is_controlled=is_controlled, memory_identity=None if is_controlled else identity)
        if book.is_controlled != is_controlled:
            raise UsageError(
                "the state directory belongs to a server " + ("without" if is_controlled else "with") + " --qmp",
                "start it as before, or name another --state",
            )
        if book.phase is Phase.COMPLETED and _files_of(book.memory_identity) != _files_of(identity):
            logger.info("the VM of the record has moved away, this is another one: its record begins anew")
            return LeaseBook.fresh(is_controlled=is_controlled, memory_identity=None if is_controlled else identity)
        resumed = book.with_memory(identity)
        if resumed is not book:
            logger.warning("the memory is not that of the record: it gets a new generation")
        return resumed

    def _make_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=list(CHANNEL_OPTIONS))
        pages = PageService(
            self.keeper,
            self.owner,
            self._limits,
            self.streams,
            self.stats,
            lanes=self._lanes,
            admission_token=self.config.admission_token,
            leases_max=self.config.leases_max,
        )
        server.add_generic_rpc_handlers((pages.handler(), SourceService(self.keeper, self.owner).handler()))
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def lane_stats(self) -> dict[str, LaneStats]:
        """The counters of all processes of the server, by lane."""
        background = LaneStats()
        background.add_json(self.stats.background.to_json())
        if self.background is not None:
            background.add_json(self.background.stats.to_json())
        return {"demand": self.stats.demand, "background": background, "express": self.stats.express}

    def _lanes(self) -> list[pb.LaneAddress]:
        lanes = []
        if self._express is not None:
            lanes.append(pb.LaneAddress(kind=pb.LANE_KIND_EXPRESS, port=self._express.port))
        if self.background is not None and self.background.is_up:
            lanes.append(pb.LaneAddress(kind=pb.LANE_KIND_BACKGROUND, port=self.background.port))
            if self.background.express_port is not None:
                lanes.append(pb.LaneAddress(kind=pb.LANE_KIND_EXPRESS_BACKGROUND, port=self.background.express_port))
        return lanes

    async def _watch_vm(self) -> None:
        while True:
            await self.owner.wait_started(min(WATCH_INTERVAL_S, self.owner.held_for_s or WATCH_INTERVAL_S))
            try:
                await self.owner.take_back()
            except FarfaultError as error:
                logger.error("the source VM cannot be taken back, which is tried again: %s", error)
            try:
                await self.owner.check_stopped()
            except FarfaultError as error:
                logger.error("cannot check that the source VM stands still: %s", error)

    async def stop(self, drain_s: float = DRAIN_S) -> None:
        """Accepts nothing more, ends streams, closes. The VM and the leases stay as they are."""
        await self._health.enter_graceful_shutdown()
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        self.streams.end_all()
        await self._server.stop(drain_s)
        if self._express is not None:
            await self._express.stop()
        if self.background is not None:
            await self.background.stop()
        await self.owner.close()
        for region in self.regions:
            region.close()


def read_token_file(path: Path) -> str:
    """The admission token: the first line of a file.

    Raises:
        UsageError: it cannot be read or is empty.
    """
    try:
        token = path.read_text().splitlines()[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the admission token file {path}: {error}", "it must be a readable text file"
        ) from error
    except IndexError:
        token = ""
    if not token:
        raise UsageError(f"the admission token file {path} is empty", "write a long random line into it")
    return token


def _files_of(identity: list[list[int]] | None) -> list[list[int]]:
    """Device and inode of each region: other files, another VM."""
    return [region[:2] for region in identity or []]
