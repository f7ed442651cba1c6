"""PageService: leases, page streams, digest."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc
from farfault.digest import DIGEST_MODULUS, pages_digest
from farfault.v1 import pages_pb2 as pb
from farfault_cli import __version__
from farfault_cli.errors import FarfaultError

from farfault_server.clock import clock_us
from farfault_server.lanes.answering import Answering
from farfault_server.lanes.limits import LaneLimits
from farfault_server.lanes.stats import LaneStats
from farfault_server.lanes.streams import Streams
from farfault_server.leases.book import MIGRATION, PROTOCOL_VERSION, LeaseBook, OpenTerms
from farfault_server.leases.keeper import LeaseKeeper
from farfault_server.leases.phases import VM_STATES, Phase, Step
from farfault_server.leases.refusals import Code, RefusedError
from farfault_server.memory import PageRegion, ServedMemory
from farfault_server.rpc.calls import Context, abort, credentials, parse, with_refusals
from farfault_server.rpc.page_stream import PageStream
from farfault_server.rpc.rate import OpenRate
from farfault_server.source_vm import VmOwner

logger = logging.getLogger(__name__)

LEASES_MAX: Final = 64
DIGEST_BLOCK_BYTES: Final = 256 << 10
"""Read and hashed at once, about 50 us; then other work has its turn."""


@dataclass(slots=True)
class ServerStats:
    """Counters of this process, by lane."""

    demand: LaneStats = field(default_factory=LaneStats)
    background: LaneStats = field(default_factory=LaneStats)
    express: LaneStats = field(default_factory=LaneStats)


@dataclass(slots=True)
class PageService:
    """The handlers of PageService.

    Attributes:
        keeper: leases.
        owner: what is done to the VM when a lease ends.
        limits: told to clients.
        streams, stats: shared with the other lanes of this process.
        lanes: addresses of lanes on ports of their own, at this moment.
        admission_token: what Open needs; None: nothing.
        leases_max: of both kinds.
    """

    keeper: LeaseKeeper
    owner: VmOwner
    limits: LaneLimits
    streams: Streams
    stats: ServerStats
    lanes: Callable[[], Sequence[pb.LaneAddress]] = list
    admission_token: str | None = None
    leases_max: int = LEASES_MAX
    _rate: OpenRate = field(default_factory=OpenRate)

    def handler(self) -> grpc.GenericRpcHandler:
        """For a gRPC server. Page streams carry raw bytes: see `farfault.codec`."""
        stream = grpc.stream_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            "farfault.v1.PageService",
            {
                "Open": unary(self.open, pb.OpenRequest),
                "Demand": stream(self.demand),
                "Background": stream(self.background),
                "Complete": unary(self.complete, pb.CompleteRequest),
                "Digest": unary(self.digest, pb.DigestRequest),
                "Release": unary(self.release, pb.ReleaseRequest),
            },
        )

    def background_handler(self) -> grpc.GenericRpcHandler:
        """The same for a server of Background alone."""
        return grpc.method_handlers_generic_handler(
            "farfault.v1.PageService", {"Background": grpc.stream_stream_rpc_method_handler(self.background)}
        )

    # ---- leases ----------------------------------------------------------------------------------

    @with_refusals
    async def open(self, request: pb.OpenRequest, context: Context) -> pb.OpenResponse:
        if not self._rate.admit(context.peer(), time.monotonic()):
            raise RefusedError(Code.RESOURCE_EXHAUSTED, "opens come too fast from this host", "wait a second")
        self._check_admission(context)
        terms = OpenTerms(
            request.protocol_version,
            request.kind,
            request.client_name,
            request.resume_lease_id,
            request.resume_token,
            request.expected_generation,
        )
        keeper = self.keeper

        def idle_s(lease_id: str) -> float:
            return 0.0 if self.streams.count(lease_id) else keeper.idle_s(lease_id)

        granted = await keeper.change(lambda book: book.open(terms, leases_max=self.leases_max, idle_s=idle_s))
        keeper.saw(granted.lease.lease_id)
        kind = "migration" if granted.lease.kind == MIGRATION else "clone"
        verb = "resumed" if request.resume_lease_id else "opened"
        logger.info(
            "%s %s lease %s for %r at %s",
            verb,
            kind,
            granted.lease.lease_id,
            granted.lease.client_name,
            context.peer(),
        )
        return pb.OpenResponse(
            protocol_version=PROTOCOL_VERSION,
            lease_id=granted.lease.lease_id,
            token=granted.token,
            generation=keeper.book.generation,
            regions=regions_to_proto(keeper.memory.regions),
            limits=self.limits.to_proto(),
            vm_state=self._vm_state(),
            server_version=__version__,
            lanes=self.lanes(),
        )

    def _check_admission(self, context: Context) -> None:
        if self.admission_token is None:
            return
        _, token = credentials(context)
        if token is None:
            raise RefusedError(
                Code.UNAUTHENTICATED,
                "this page server wants an admission token",
                "give the client the token of the server's --admission-token-file",
            )
        if not hmac.compare_digest(token.encode(), self.admission_token.encode()):
            raise RefusedError(Code.PERMISSION_DENIED, "the admission token is wrong", "use that of this server")

    def _vm_state(self) -> pb.VmState:
        phase = self.keeper.book.phase
        if phase is Phase.SUSPENDING and self.keeper.memory.readable:
            return pb.VM_STATE_FROZEN
        return VM_STATES[phase]

    @with_refusals
    async def complete(self, request: pb.CompleteRequest, context: Context) -> pb.CompleteResponse:
        lease = self.keeper.authorize(*credentials(context))
        if lease.kind != MIGRATION:
            return pb.CompleteResponse()  # a copy for reading is complete: nothing of the source depends on it

        def decide(book: LeaseBook) -> tuple[LeaseBook, None]:
            if request.generation != book.generation:
                raise RefusedError(
                    Code.FAILED_PRECONDITION,
                    f"pages of generation {request.generation} are complete, but the memory is of {book.generation}",
                    "the source VM may have run; keep both and look into it",
                )
            return book.step(Step.COMPLETE), None

        await self.keeper.change(decide)
        logger.info("complete: %d pages installed, %d of them zero", request.installed_pages, request.zero_pages)
        return pb.CompleteResponse()

    @with_refusals
    async def release(self, _request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        lease_id, token = credentials(context)
        _, lease = self.keeper.book.release(lease_id, token)  # refuses before anything is done
        if lease is None:
            return pb.ReleaseResponse()
        if lease.kind == MIGRATION:
            await self.owner.ensure_running()
        await self.keeper.change(lambda book: book.release(lease_id, token))
        logger.info("lease %s was given back", lease.lease_id)
        return pb.ReleaseResponse()

    # ---- pages -----------------------------------------------------------------------------------

    async def demand(self, _requests: object, context: Context) -> None:
        """Urgent pages."""
        await self._serve_stream(context, self.stats.demand, is_background=False)

    async def background(self, _requests: object, context: Context) -> None:
        """The rest of memory, where the client cannot reach the process that has nothing else to do."""
        await self._serve_stream(context, self.stats.background, is_background=True)

    async def _serve_stream(self, context: Context, stats: LaneStats, *, is_background: bool) -> None:
        try:
            lease = self.keeper.authorize(*credentials(context))
            core = Answering(self.keeper.memory, self.limits, stats, clock_us)
            stream = PageStream(context, core, self.streams, is_background=is_background)
            with self.streams.opened(lease.lease_id, stream.end, demand=None if is_background else core.line):
                stats.streams += 1
                try:
                    await stream.run()
                finally:
                    stats.streams -= 1
                    self.keeper.saw(lease.lease_id)
        except FarfaultError as error:
            await abort(context, error)

    @with_refusals
    async def digest(self, request: pb.DigestRequest, context: Context) -> pb.DigestResponse:
        self.keeper.authorize(*credentials(context))
        memory = self.keeper.memory
        self._check_digest(request, memory.regions)
        generation = memory.generation
        digests = [await self._digest_range(item, generation) for item in request.ranges]
        return pb.DigestResponse(digests=digests, generation=generation)

    def _check_digest(self, request: pb.DigestRequest, regions: Sequence[PageRegion]) -> None:
        pages_left = self.limits.max_digest_pages
        if len(request.ranges) > pages_left:
            raise RefusedError(Code.RESOURCE_EXHAUSTED, f"more than {pages_left} ranges in one digest", "ask in parts")
        for item in request.ranges:
            if item.region >= len(regions):
                raise RefusedError(Code.INVALID_ARGUMENT, f"no region {item.region}")
            region = regions[item.region]
            if item.first_page + item.page_count > region.size_bytes // region.page_size_bytes:
                raise RefusedError(
                    Code.INVALID_ARGUMENT, f"no pages {item.first_page}+{item.page_count} in region {item.region}"
                )
            pages_left -= item.page_count
        if pages_left < 0:
            raise RefusedError(
                Code.RESOURCE_EXHAUSTED, f"more than {self.limits.max_digest_pages} pages in one digest", "ask in parts"
            )

    async def _digest_range(self, item: pb.PageRange, generation: int) -> int:
        memory = self.keeper.memory
        region = memory.regions[item.region]
        step = max(1, DIGEST_BLOCK_BYTES // region.page_size_bytes)
        end = item.first_page + item.page_count
        total = 0
        for first in range(item.first_page, end, step):
            self._check_still(memory, generation)
            try:
                block = region.read(first, min(step, end - first))
            except OSError as error:
                raise RefusedError(
                    Code.INTERNAL, f"memory cannot be read: {error}", "see the kernel log for memory errors"
                ) from error
            total += pages_digest(block, first, region.page_size_bytes)
            await asyncio.sleep(0)
        self._check_still(memory, generation)
        return total % DIGEST_MODULUS

    @staticmethod
    def _check_still(memory: ServedMemory, generation: int) -> None:
        if not memory.readable or memory.generation != generation:
            raise RefusedError(Code.FAILED_PRECONDITION, "the VM runs: its memory has no digest", "suspend it first")


def regions_to_proto(regions: Sequence[PageRegion]) -> list[pb.Region]:
    """Regions as Open tells them, end to end in the flat space."""
    described = []
    offset_bytes = 0
    for index, region in enumerate(regions):
        described.append(
            pb.Region(
                id=index,
                name=region.name,
                size_bytes=region.size_bytes,
                page_size_bytes=region.page_size_bytes,
                offset_bytes=offset_bytes,
                backing=region.backing,
            )
        )
        offset_bytes += region.size_bytes
    return described


def unary(handler, request_type):  # type: ignore[no-untyped-def]
    """A gRPC handler of a unary call with generated messages."""

    async def handle(message, context):  # type: ignore[no-untyped-def]
        try:
            request = parse(request_type, message)
        except RefusedError as error:
            await abort(context, error)
        return await handler(request, context)

    return grpc.unary_unary_rpc_method_handler(
        handle, response_serializer=lambda response: response.SerializeToString()
    )
