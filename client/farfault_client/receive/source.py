"""The source VM as the destination reaches it: through its page server's port only."""

from __future__ import annotations

import asyncio
import random
from typing import NamedTuple

import grpc.aio
import xxhash
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_cli.errors import FarfaultError, UnreachableError
from farfault_vmm.description import VmDescription

from farfault_client.session.backoff import backoff
from farfault_client.session.session import Session, explain

CALL_TIMEOUT_S = 15.0
SUSPEND_TIMEOUT_S = 60.0
DEVICE_STATE_BYTES_MAX = 1 << 30


class DeviceState(NamedTuple):
    """What `SourceVm.suspend` brings."""

    data: bytes
    generation: int


class SourceVm:
    """Calls on the source VM under a session's lease. Every method raises FarfaultError with the server's reason."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def describe(self) -> VmDescription:
        response = await self._call(self._stub().DescribeVm, pb.DescribeVmRequest())
        return VmDescription.from_proto(response.description)

    async def suspend(self) -> DeviceState:
        """Stops the VM and fetches its device state, whole and checked."""
        chunks: list[bytes] = []
        size_bytes = 0
        try:
            call = self._stub().Suspend(
                pb.SuspendRequest(), metadata=self._session.metadata(), timeout=SUSPEND_TIMEOUT_S
            )
            async for chunk in call:
                chunks.append(chunk.data)
                size_bytes += len(chunk.data)
                if size_bytes > DEVICE_STATE_BYTES_MAX:
                    raise FarfaultError(f"device state is longer than {DEVICE_STATE_BYTES_MAX} bytes")
                if chunk.last:
                    data = b"".join(chunks)
                    if xxhash.xxh3_64_intdigest(data) != chunk.checksum:
                        raise FarfaultError("device state arrived damaged", "try again")
                    return DeviceState(data, chunk.generation)
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._session.config.target) from error
        raise FarfaultError("device state ended early", "see the page server's log")

    async def hand_over(self, generation: int) -> None:
        """The point of no return. Asked again until the server answers: only its answer says who owns the VM."""
        await self._insist(self._stub().HandOver, pb.HandOverRequest(generation=generation))

    async def resume(self) -> None:
        """The source runs again."""
        await self._insist(self._stub().Resume, pb.ResumeRequest())

    async def complete(self, request: pb.CompleteRequest) -> None:
        """Every page is here; asked again until the server answers."""
        stub = pages_pb2_grpc.PageServiceStub(self._session.control_channel())
        await self._insist(stub.Complete, request)

    async def release(self) -> None:
        """Gives the lease back."""
        stub = pages_pb2_grpc.PageServiceStub(self._session.control_channel())
        await self._call(stub.Release, pb.ReleaseRequest())

    def _stub(self) -> pages_pb2_grpc.SourceServiceStub:
        return pages_pb2_grpc.SourceServiceStub(self._session.control_channel())

    async def _call(self, method, request):  # type: ignore[no-untyped-def]
        try:
            return await method(request, metadata=self._session.metadata(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._session.config.target) from error

    async def _insist(self, method, request) -> None:  # type: ignore[no-untyped-def]
        for wait_s in backoff(random.random):
            try:
                await self._call(method, request)
            except UnreachableError:
                await asyncio.sleep(wait_s)
            else:
                return
