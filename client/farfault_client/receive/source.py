"""The source VM as the destination reaches it: through its page server's port only."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import grpc.aio
import xxhash
from farfault.digest import DIGEST_MODULUS
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_cli.errors import FarfaultError, UnreachableError
from farfault_shim.layout import PageRun, Region
from farfault_vmm.description import VmDescription

from farfault_client.session.backoff import backoff
from farfault_client.session.lease import explain
from farfault_client.session.session import Session

Method = Callable[..., Awaitable[Any]]

RESUME_AFTER_S = 5.0
"""The source VM, stopped for us, runs again by itself when it has not heard of us for so long before the hand-over."""
HOLD_INTERVAL_S = 1.0
"""How often it hears of us."""
CALL_TIMEOUT_S = 15.0
HAND_OVER_TIMEOUT_S = 2.0
"""For the first answer to HandOver, during which no VM runs; twice as long each time, up to `CALL_TIMEOUT_S`."""
SUSPEND_TIMEOUT_S = 60.0
DEVICE_STATE_BYTES_MAX = 1 << 30


class SourceVm:
    """Calls on the source VM under a session's lease. Every method raises FarfaultError with the server's reason.

    Attributes:
        stopped_at: when the source VM stopped, in seconds of this host's monotonic clock, less the time that
            the answer travelled; 0 before `suspend`.
        state_bytes: size of the device state.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.stopped_at = 0.0
        self.state_bytes = 0
        self._is_stopped = False
        self._ending: object = None

    async def describe(self) -> VmDescription:
        response = await self._call(self._stub().DescribeVm, pb.DescribeVmRequest())
        return VmDescription.from_proto(response.description)

    async def suspend(self, on_frozen: Callable[[int], None]) -> AsyncIterator[bytes]:
        """Stops the VM and yields its device state. The last byte is only yielded once the whole is checked.

        Args:
            on_frozen: called with the generation of the frozen memory before the first byte is yielded.
        """
        digest, held, self._is_stopped = xxhash.xxh3_64(), b"", False
        try:
            call = self._stub().Suspend(
                pb.SuspendRequest(resume_after_ms=int(RESUME_AFTER_S * 1000)),
                metadata=self._session.lease_metadata(),
                timeout=SUSPEND_TIMEOUT_S,
            )
            async for chunk in call:
                if not self._is_stopped and chunk.generation:
                    self._is_stopped = True
                    on_frozen(chunk.generation)
                digest.update(chunk.data)
                self.state_bytes += len(chunk.data)
                if self.state_bytes > DEVICE_STATE_BYTES_MAX:
                    raise FarfaultError(f"device state is longer than {DEVICE_STATE_BYTES_MAX} bytes")
                if chunk.stopped_for_us:
                    self.stopped_at = time.monotonic() - chunk.stopped_for_us * 1e-6
                if chunk.last and digest.intdigest() != chunk.checksum:
                    raise FarfaultError("device state arrived damaged", "try again")
                ready, held = held, chunk.data
                if ready:
                    yield ready
                if chunk.last:
                    self._ending = call  # the server is still saving its record: a call that is dropped is cancelled
                    if held:
                        yield held
                    return
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._session.config.peer.target) from error
        raise FarfaultError("device state ended early", "see the page server's log")

    async def while_held(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something with the suspended VM's state, while the source hears of us and so stays stopped.

        Raises:
            FarfaultError: the source VM was taken back all the same: what was done is in vain, and broken off.
        """
        loop = asyncio.get_running_loop()
        refused: asyncio.Future[None] = loop.create_future()
        holding, working = loop.create_task(self._hold(refused)), loop.create_task(work)
        try:
            await asyncio.wait({refused, working}, return_when=asyncio.FIRST_COMPLETED)
            await (working if working.done() else refused)
        finally:
            for waiting in (holding, working, refused):
                waiting.cancel()
            await asyncio.gather(holding, working, refused, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def held(self, *, at_once: bool = False) -> AsyncIterator[None]:
        """Meanwhile the source hears of us. For the hand-over: its answer alone says who owns the VM.

        Args:
            at_once: it may have waited for us before, for an earlier receiver of the move.
        """
        holding = asyncio.get_running_loop().create_task(self._hold(at_once=at_once))
        try:
            yield
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    async def _hold(self, refused: asyncio.Future[None] | None = None, *, at_once: bool = False) -> None:
        """Tells the source again and again that we are there; `refused` learns when it no longer waits for us."""
        calls: set[asyncio.Task[None]] = set()
        wait_s = 0.0 if at_once else HOLD_INTERVAL_S
        try:
            while True:
                await asyncio.sleep(wait_s)
                # None waits for the answer to the one before: on a slow link several are under way.
                call = asyncio.get_running_loop().create_task(self._hold_once(refused))
                calls.add(call)
                call.add_done_callback(calls.discard)
                wait_s = HOLD_INTERVAL_S
        finally:
            for call in calls:
                call.cancel()

    async def _hold_once(self, refused: asyncio.Future[None] | None) -> None:
        """A source that is out of reach, or too old to know the call, has not refused."""
        was_stopped = self._is_stopped  # one that has not begun to wait refuses too
        request = pb.HoldRequest(resume_after_ms=int(RESUME_AFTER_S * 1000))
        try:
            await self._stub().Hold(request, metadata=self._session.lease_metadata(), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            is_refusal = was_stopped and error.code() is grpc.StatusCode.FAILED_PRECONDITION
            if is_refusal and refused is not None and not refused.done():
                refused.set_exception(explain(error, self._session.config.peer.target))

    async def hand_over(self, generation: int) -> None:
        """The point of no return. Asked again until the server answers: only its answer says who owns the VM."""
        request = pb.HandOverRequest(generation=generation)
        await self._insist(lambda channel: _source_stub(channel).HandOver, request, first_timeout_s=HAND_OVER_TIMEOUT_S)

    async def resume(self) -> None:
        """The source runs again. Asked again until the server answers.

        Raises:
            FarfaultError: it was handed over.
        """
        await self._insist(lambda channel: _source_stub(channel).Resume, pb.ResumeRequest())

    async def complete(self, request: pb.CompleteRequest) -> None:
        """Every page is here; asked again until the server answers."""
        await self._insist(lambda channel: _page_stub(channel).Complete, request)

    async def digest(self, region: Region, runs: Sequence[PageRun]) -> int:
        """The page server's digest of pages of one region; asked again until it answers.

        Raises:
            FarfaultError: it refuses, or its memory is of another generation.
        """
        ranges = [
            pb.PageRange(region=region.index, first_page=run.first - region.first_page, page_count=run.count)
            for run in runs
        ]
        request = pb.DigestRequest(ranges=ranges)
        response: pb.DigestResponse = await self._insist(lambda channel: _page_stub(channel).Digest, request)
        if response.generation != self._session.key.generation or len(response.digests) != len(runs):
            raise FarfaultError(f"a digest of generation {response.generation}, not {self._session.key.generation}")
        return sum(response.digests) % DIGEST_MODULUS

    async def release(self) -> None:
        """Gives the lease back."""
        await self._call(_page_stub(self._session.control_channel()).Release, pb.ReleaseRequest())

    def _stub(self) -> pages_pb2_grpc.SourceServiceStub:
        return _source_stub(self._session.control_channel())

    async def _call(self, method: Method, request: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        try:
            return await method(request, metadata=self._session.lease_metadata(), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            raise explain(error, self._session.config.peer.target) from error

    async def _insist(
        self,
        method_of: Callable[[grpc.aio.Channel], Method],
        request: object,
        *,
        first_timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        """Asks until the server answers.

        Each time but the first over a connection of its own: packets may vanish on the one that is there, and it may
        be long until it is known. Each time with more patience: the link may only be slow.
        """
        timeout_s = first_timeout_s
        with contextlib.suppress(UnreachableError):
            return await self._call(method_of(self._session.control_channel()), request, timeout_s)
        for wait_s in backoff(random.random):
            await asyncio.sleep(wait_s)
            timeout_s = min(2 * timeout_s, CALL_TIMEOUT_S)
            with contextlib.suppress(UnreachableError):
                async with self._session.config.peer.channel() as channel:
                    return await self._call(method_of(channel), request, timeout_s)
        raise AssertionError("a back-off never ends")


def _source_stub(channel: grpc.aio.Channel) -> pages_pb2_grpc.SourceServiceStub:
    return pages_pb2_grpc.SourceServiceStub(channel)


def _page_stub(channel: grpc.aio.Channel) -> pages_pb2_grpc.PageServiceStub:
    return pages_pb2_grpc.PageServiceStub(channel)
