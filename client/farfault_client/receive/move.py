"""The switchover of one VM: who owns it at each step, and the way back until the point of no return.

::

    OPENED ──▶ SUSPENDING ──▶ HANDING_OVER ──▶ RUNNING ──▶ COMPLETED
                   │               │
                   └──▶ ROLLED_BACK ◀ (only if the page server says that it has not handed over)

A step is on disk before the act that it names (`journal`), but for RUNNING: the VM runs from the answer to HandOver on,
and the record of it follows. The point of no return is the page server's durable record of HandOver: before it the
source VM may be resumed, after it never. So a receiver that died in HANDING_OVER asks that record, by HandOver again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from farfault_cli.errors import FarfaultError, RolledBackError

from farfault_client.receive.journal import Journal, Step
from farfault_client.receive.source import SourceVm
from farfault_client.session.session import Session

logger = logging.getLogger(__name__)


class DestinationVmm(Protocol):
    """The VMM on this host, as far as a move needs it; `farfault_vmm.qmp.QmpVmm` is one."""

    async def prepare_destination(self) -> None:
        """Everything that can be done before the source stops."""

    async def load(self, chunks: AsyncIterator[bytes]) -> None:
        """Loads device state; afterwards the VM is paused, complete but for its RAM."""

    async def cont(self) -> int:
        """Runs the VM; returns the Unix time of its start in microseconds."""


class Move:
    """Carries a VM over. `run` once; `roll_back` if it fails or is cancelled before the point of no return.

    Args:
        session: an open one.
        source: its VM.
        destination: the VMM on this host, started to receive; None: it is gone, and only `roll_back` is left.
        journal: holds the record of this lease.
        on_frozen: called when the source's memory is frozen.
    """

    def __init__(
        self,
        session: Session,
        source: SourceVm,
        destination: DestinationVmm | None,
        journal: Journal,
        on_frozen: Callable[[], None] = lambda: None,
    ) -> None:
        self._session = session
        self._source = source
        self._destination = destination
        self._journal = journal
        self._on_frozen = on_frozen
        self.downtime_s = 0.0
        self._marks: list[tuple[str, float]] = []

    async def run(self) -> None:
        """Suspend, load, hand over, run. When it returns the destination runs.

        Raises:
            RolledBackError: it failed before the point of no return; the source runs as before.
            FarfaultError: it failed and the source could not be brought back, or it failed afterwards.
        """
        assert self._destination is not None
        try:
            await self._destination.prepare_destination()
            self._journal.step(Step.SUSPENDING)
            await self._source.while_held(self._destination.load(self._source.suspend(self._frozen)))
        except (FarfaultError, asyncio.CancelledError) as error:
            await self.roll_back(error)
        self._mark("device state")
        self._journal.write_generation(Step.HANDING_OVER, self._session.key.generation)
        await self.finish()

    async def finish(self) -> None:
        """From HANDING_OVER on: the destination holds the whole state and runs once the server has agreed."""
        assert self._destination is not None
        try:
            async with self._source.held():
                await self._source.hand_over(self._session.key.generation)
        except FarfaultError as error:
            await self.roll_back(error)
        self._mark("hand-over")
        await self._destination.cont()
        self._mark("start")
        if self._source.stopped_at:
            self.downtime_s = time.monotonic() - self._source.stopped_at
            logger.info("the VM runs here; downtime %.1f ms: %s", self.downtime_s * 1e3, self._parts())
        # In a thread: the guest runs, and misses pages.
        await asyncio.to_thread(self._journal.step, Step.RUNNING)

    async def roll_back(self, cause: BaseException) -> None:
        """Brings the source back; always raises.

        Raises:
            RolledBackError: the source runs again.
            FarfaultError: the server refuses: it has handed over already.
        """
        reason = cause.problem if isinstance(cause, FarfaultError) else "the move was aborted"
        remedy = cause.remedy if isinstance(cause, FarfaultError) else ""
        logger.warning("rolling back: %s", reason)
        try:
            await asyncio.shield(self._source.resume())
        except FarfaultError as error:
            raise FarfaultError(f"{reason}; and the source VM stays stopped: {error.problem}", error.remedy) from cause
        self._journal.step(Step.ROLLED_BACK)
        raise RolledBackError(f"{reason}; the source VM runs as before", remedy) from cause

    def _mark(self, part: str) -> None:
        """A part of the downtime is over."""
        self._marks.append((part, time.monotonic()))

    def _parts(self) -> str:
        began, parts = self._source.stopped_at, []
        for part, ended in self._marks:
            parts.append(f"{part} {(ended - began) * 1e3:.1f}")
            began = ended
        return ", ".join(parts)

    def _frozen(self, generation: int) -> None:
        self._session.expect_generation(generation)
        self._on_frozen()
