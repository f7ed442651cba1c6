"""SourceService: the VM behind the memory."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from dataclasses import dataclass

import grpc
from farfault.v1 import pages_pb2 as pb
from farfault_cli.errors import FarfaultError

from farfault_server.leases.book import Lease
from farfault_server.leases.keeper import LeaseKeeper
from farfault_server.rpc.calls import Context, abort, credentials, parse, with_refusals
from farfault_server.rpc.page_service import unary
from farfault_server.source_vm import VmOwner

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SourceService:
    """The handlers of SourceService."""

    keeper: LeaseKeeper
    owner: VmOwner

    def handler(self) -> grpc.GenericRpcHandler:
        """For a gRPC server."""
        return grpc.method_handlers_generic_handler(
            "farfault.v1.SourceService",
            {
                "DescribeVm": unary(self.describe_vm, pb.DescribeVmRequest),
                "Suspend": grpc.unary_stream_rpc_method_handler(
                    self.suspend,
                    response_serializer=lambda chunk: chunk.SerializeToString(),
                ),
                "Hold": unary(self.hold, pb.HoldRequest),
                "HandOver": unary(self.hand_over, pb.HandOverRequest),
                "Resume": unary(self.resume, pb.ResumeRequest),
            },
        )

    @with_refusals
    async def describe_vm(self, _request: pb.DescribeVmRequest, context: Context) -> pb.DescribeVmResponse:
        self.keeper.authorize(*credentials(context))
        return pb.DescribeVmResponse(description=(await self.owner.describe()).to_proto())

    async def suspend(self, message: bytes, context: Context) -> None:
        """Writes the chunks itself: a write that fails, or a client that leaves, ends the generator early.

        So does a client that is not heard of: a link on which packets vanish keeps a write waiting.
        """
        try:
            request = parse(pb.SuspendRequest, message)
            lease = self.keeper.authorize(*credentials(context))
            sending = self._send_device_state(lease, request.resume_after_ms / 1000, context)
            await self.owner.while_held(asyncio.ensure_future(sending))
        except FarfaultError as error:
            logger.warning("Suspend failed: %s", error.problem)
            await abort(context, error)

    async def _send_device_state(self, lease: Lease, silence_s_max: float, context: Context) -> None:
        async with aclosing(self.owner.suspend(lease, silence_s_max)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                await context.write(chunk)

    @with_refusals
    async def hold(self, request: pb.HoldRequest, context: Context) -> pb.HoldResponse:
        lease = self.keeper.authorize(*credentials(context))
        self.owner.hold(lease, request.resume_after_ms / 1000)
        return pb.HoldResponse()

    @with_refusals
    async def hand_over(self, request: pb.HandOverRequest, context: Context) -> pb.HandOverResponse:
        lease = self.keeper.authorize(*credentials(context))
        await self.owner.hand_over(lease, request.generation)
        return pb.HandOverResponse()

    @with_refusals
    async def resume(self, _request: pb.ResumeRequest, context: Context) -> pb.ResumeResponse:
        lease = self.keeper.authorize(*credentials(context))
        await self.owner.resume(lease)
        return pb.ResumeResponse()
