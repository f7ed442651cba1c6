"""A move as seen over the receiver's control socket: its stream of statuses, its progress bar, its verdict."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from farfault.v1 import receiver_pb2 as rpb
from farfault.v1 import receiver_pb2_grpc
from farfault_cli.errors import FarfaultError, UnreachableError, error_of_exit_code

CALL_TIMEOUT_S = 30.0
CONTROL_OPTIONS = (("grpc.max_receive_message_length", 16 << 20),)
"""A working set of 2^20 pages has 8 MiB."""

PHASES = {
    rpb.PHASE_WAITING: "waiting",
    rpb.PHASE_PREFLIGHT: "preflight",
    rpb.PHASE_SWITCHOVER: "switchover",
    rpb.PHASE_POSTCOPY: "post-copy",
    rpb.PHASE_DONE: "done",
    rpb.PHASE_FAILED: "failed",
}


class ReceiverClient:
    """Calls on a receiver's control socket. Use as an async context manager."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._channel = grpc.aio.insecure_channel(f"unix:{control}", options=CONTROL_OPTIONS)
        self._stub = receiver_pb2_grpc.ReceiverServiceStub(self._channel)

    async def __aenter__(self) -> ReceiverClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def preflight(self) -> list[rpb.Check]:
        """Runs all checks."""
        response = await self._call(self._stub.Preflight, rpb.PreflightRequest())
        return list(response.checks)

    async def abort(self) -> None:
        """Brings the source back, if it is not too late."""
        await self._call(self._stub.Abort, rpb.AbortRequest())

    async def working_set(self) -> bytes:
        """Pages that the guest has missed, packed as `farfault_client.receive.working_set` says."""
        response = await self._call(self._stub.WorkingSet, rpb.WorkingSetRequest())
        return bytes(response.pages)

    async def tune(self, background_bytes_per_s: int) -> None:
        """Caps the background lane from now on."""
        await self._call(self._stub.Tune, rpb.TuneRequest(background_bytes_per_s=background_bytes_per_s))

    def migrate(self) -> AsyncIterator[rpb.MigrationStatus]:
        """Starts (or joins) the move; statuses until it ends."""
        return self._stream(self._stub.Migrate(rpb.MigrateRequest()))

    def watch(self, interval_ms: int = 0, map_cells: int = 0) -> AsyncIterator[rpb.MigrationStatus]:
        """Statuses until the move ends."""
        return self._stream(self._stub.Watch(rpb.WatchRequest(interval_ms=interval_ms, map_cells=map_cells)))

    async def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return await method(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error

    async def _stream(self, call: Any) -> AsyncIterator[rpb.MigrationStatus]:
        try:
            async for status in call:
                yield status
        except grpc.aio.AioRpcError as error:
            raise self._explain(error) from error

    def _explain(self, error: grpc.aio.AioRpcError) -> FarfaultError:
        details = error.details() or error.code().name
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return UnreachableError(
                f"the receiver at {self._control} does not answer: {details}",
                "check that `farfault receive` runs; if it died in a move, the same command takes the move up again",
            )
        problem, _, remedy = details.partition("\n  remedy: ")
        return FarfaultError(problem, remedy)


def verdict_of(status: rpb.MigrationStatus) -> None:
    """Raises what a failed move failed with; returns for one that is done."""
    if status.phase != rpb.PHASE_DONE:
        raise error_of_exit_code(status.exit_code, status.error or "the receiver ended early", status.remedy)


@contextmanager
def progress_bar(*, enabled: bool) -> Iterator[Callable[[rpb.MigrationStatus], None]]:
    """Gives a function that shows a status; does nothing where not enabled or standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    if not enabled:
        yield lambda status: None
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.completed:>9,.0f}/{task.total:,.0f} pages"),
        TextColumn("{task.fields[faults]:>7,} faults  {task.fields[rate]:>6.0f} MiB/s  ETA {task.fields[eta]:>5.1f} s"),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as bar:
        task = bar.add_task("waiting", total=1, faults=0, rate=0.0, eta=0.0)

        def show(status: rpb.MigrationStatus) -> None:
            settled = status.counters["settled_pages"]
            moved_mib = settled * status.page_size_bytes / (1 << 20)
            bar.update(
                task,
                description=PHASES.get(status.phase, ""),
                total=max(1, status.guest_pages),
                completed=settled,
                faults=status.demand_faults,
                rate=moved_mib / status.postcopy_s if status.postcopy_s else 0.0,
                eta=status.eta_s,
            )

        yield show
