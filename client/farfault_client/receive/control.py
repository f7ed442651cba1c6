"""The receiver's control service on a unix socket: `farfault migrate`, `farfault top` and scripts speak to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from farfault.v1 import receiver_pb2 as rpb
from farfault.v1 import receiver_pb2_grpc
from farfault_cli.errors import FarfaultError, UsageError

from farfault_client.receive.receiver import Receiver

STATUS_INTERVAL_DEFAULT_MS = 200
STATUS_INTERVAL_MIN_MS = 20
MAP_CELLS_MAX = 4096

Context = grpc.aio.ServicerContext[Any, Any]
ENDED = (rpb.PHASE_DONE, rpb.PHASE_FAILED)

STOP_GRACE_S: Final = 0.5
LINGER_S: Final = 0.2
"""A client reads its last status meanwhile and closes. Were we the first to close, one that just wants to write (gRPC
acknowledges what it reads) would find the connection broken, and never see the end of a move that went well."""


class ControlService(receiver_pb2_grpc.ReceiverServiceServicer):
    """See receiver.proto.

    Args:
        receiver: whose.
        start_move: begins the move, or joins the one that is under way; returns at once.
    """

    def __init__(self, receiver: Receiver, start_move: Callable[[], None]) -> None:
        self._receiver = receiver
        self._start_move = start_move

    async def Preflight(  # noqa: N802 - gRPC's name
        self, request: rpb.PreflightRequest, context: Context
    ) -> rpb.PreflightResponse:
        return rpb.PreflightResponse(checks=await self._receiver.preflight())

    async def Migrate(  # noqa: N802
        self, request: rpb.MigrateRequest, context: Context
    ) -> AsyncIterator[rpb.MigrationStatus]:
        self._start_move()
        async for status in self._follow(request.status_interval_ms, 0):
            yield status

    async def Watch(  # noqa: N802
        self, request: rpb.WatchRequest, context: Context
    ) -> AsyncIterator[rpb.MigrationStatus]:
        async for status in self._follow(request.interval_ms, min(request.map_cells, MAP_CELLS_MAX)):
            yield status

    async def WorkingSet(  # noqa: N802
        self, request: rpb.WorkingSetRequest, context: Context
    ) -> rpb.WorkingSetResponse:
        pager = self._receiver.pager
        return rpb.WorkingSetResponse(pages=pager.working_set.pack() if pager is not None else b"")

    async def Tune(  # noqa: N802
        self, request: rpb.TuneRequest, context: Context
    ) -> rpb.TuneResponse:
        self._receiver.set_bandwidth(request.background_bytes_per_s)
        return rpb.TuneResponse()

    async def Abort(  # noqa: N802
        self, request: rpb.AbortRequest, context: Context
    ) -> rpb.AbortResponse:
        try:
            await self._receiver.abort()
        except FarfaultError as error:
            await _refuse(context, error)
        return rpb.AbortResponse()

    async def _follow(self, interval_ms: int, map_cells: int) -> AsyncIterator[rpb.MigrationStatus]:
        interval_s = max(interval_ms or STATUS_INTERVAL_DEFAULT_MS, STATUS_INTERVAL_MIN_MS) / 1000
        while True:
            changed = self._receiver.changed
            status = self._receiver.status(map_cells)
            yield status
            if status.phase in ENDED:
                return
            try:
                async with asyncio.timeout(interval_s):
                    await changed.wait()
            except TimeoutError:
                continue


async def _refuse(context: Context, error: FarfaultError) -> NoReturn:
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    raise AssertionError("abort raises")


async def serve_control(path: Path, service: ControlService) -> Callable[[], Awaitable[None]]:
    """Serves on a unix socket that only our own user can reach. Returns how to end it.

    Raises:
        UsageError: the path cannot be listened on.
    """
    server = grpc.aio.server()
    receiver_pb2_grpc.add_ReceiverServiceServicer_to_server(service, server)
    try:
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    except RuntimeError as error:
        raise UsageError(
            f"cannot listen on {path}: {error}", "its folder must exist and no other receiver may use it"
        ) from error
    path.chmod(0o600)

    async def end() -> None:
        path.unlink(missing_ok=True)  # nobody else comes
        await asyncio.sleep(LINGER_S)
        await server.stop(grace=STOP_GRACE_S)

    return end
