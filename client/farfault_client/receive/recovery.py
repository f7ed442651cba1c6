"""What a receiver does where the one before it was interrupted.

Nothing is taken on trust: the journal says how far the move had come, the page server who owns the VM, the destination
VMM whether it holds it, and the kernel which pages are in memory. docs/recovery.md has the cases in a table.
"""

from __future__ import annotations

import asyncio
import logging
import random
from itertools import chain

from farfault_cli.errors import FarfaultError, GuestWaitsError, RolledBackError, UnreachableError, UsageError
from farfault_shim.attach.vmm import AttachedVmm
from farfault_shim.install.resident import resident_runs

from farfault_client.receive.destination import Destination
from farfault_client.receive.endings import wrong
from farfault_client.receive.journal import Journal, Record, Step
from farfault_client.receive.move import Move
from farfault_client.receive.pager import Pager
from farfault_client.receive.removed_log import RemovedLog
from farfault_client.receive.source import SourceVm
from farfault_client.session.backoff import backoff
from farfault_client.session.session import Session

logger = logging.getLogger(__name__)

RELEASE_ATTACH_TIMEOUT_S = 5.0
"""A receiver that was restarted after the last page waits this long for a VMM that may have been released already."""


class Recovery:
    """Takes a move up: `find` its record, `reopen` the lease, `rebuild` the pages when the VMM attaches, and `settle`.

    Args:
        session: not opened yet.
        source: its VM.
        destination: the VMM on this host.
        journal: of the receiver that was interrupted; ours from now on.
        removed: the pages that the guest had given back.
        attached: set while the VMM is attached.
    """

    def __init__(
        self,
        session: Session,
        source: SourceVm,
        destination: Destination,
        journal: Journal,
        removed: RemovedLog,
        attached: asyncio.Event,
    ) -> None:
        self._session = session
        self._source = source
        self._destination = destination
        self._journal = journal
        self._removed = removed
        self._attached = attached

    def find(self) -> Record | None:
        """The record of a move to take up; None: there is none, or it ended with the source running.

        Raises:
            UsageError: it is the record of a move from another page server.
        """
        record = self._journal.record
        if record is not None and record.step is Step.ROLLED_BACK:
            self._journal.forget()
            return None
        target = self._session.config.peer.target
        if record is not None and record.target != target:
            raise UsageError(
                f"{self._journal.path} is the record of a move from {record.target}, not from {target}",
                "take that move up with the same --source, or name another folder with --state",
            )
        return record

    async def reopen(self, record: Record) -> None:
        """Takes the lease up again.

        Until the VM has run here the source may have been rolled back, which makes another generation of its
        memory: that must not keep us from finding out.

        Raises:
            UnreachableError: the page server does not answer, and no guest waits for it.
            FarfaultError: it refuses.
        """
        may_differ = record.step in (Step.OPENED, Step.SUSPENDING, Step.HANDING_OVER)
        key = record.lease._replace(generation=0) if may_differ else record.lease
        waits = backoff(random.random)
        while True:
            try:
                await self._session.open(key)
                self._session.expect_generation(record.generation)
                return
            except UnreachableError as error:
                if not record.vm_may_be_here:
                    raise
                logger.warning("%s; the guest waits", error.problem)
                await asyncio.sleep(next(waits))

    def rebuild(self, pager: Pager, vmm: AttachedVmm) -> None:
        """The installed set from the kernel, never from hope. Before the pager attaches the VMM."""
        if vmm.layout != pager.layout:
            return  # attach says so
        resident = chain.from_iterable(map(resident_runs, vmm.ram_fds, vmm.layout.regions))
        pager.restore(resident, self._removed.runs(vmm.layout.page_count))
        logger.info("%d pages were in memory already", pager.engine.settled_pages)

    async def settle(self, step: Step) -> None:
        """Finds out who owns the VM, and acts on it. When it returns the VM runs here, or has all of its memory.

        Args:
            step: that the move had come to.

        Raises:
            RolledBackError: it had not come to the point of no return; the source runs.
            GuestWaitsError: the destination VMM is gone although the VM was handed over to it.
            VerificationError: its memory had been found wrong.
            FarfaultError: it cannot be found out.
        """
        if step in (Step.OPENED, Step.SUSPENDING):
            await self._source.resume()
            self._journal.step(Step.ROLLED_BACK)
            raise RolledBackError("the receiver was interrupted before the hand-over; the source VM runs as before")
        if step is Step.WRONG:
            raise wrong("an earlier receiver of this move found memory that is not what the page server holds")
        if step is Step.COMPLETED:
            await self._wait_for_release()
            return
        if step is Step.HANDING_OVER:
            await self._settle_hand_over()
        elif step is Step.RUNNING and self._destination.is_controlled:
            await self._run_if_paused()
        await self._attached.wait()

    async def _settle_hand_over(self) -> None:
        """The receiver died between its record of HANDING_OVER and that of RUNNING: the VM may run here already.

        Only the page server knows on which side of the point of no return that was.

        Raises:
            RolledBackError: before it, and the destination VMM no longer holds the VM; the source runs.
            FarfaultError: after it, and the destination VMM no longer holds the VM.
        """
        try:
            destination = await self._destination.connect()
            lacks = "" if await destination.status() != "inmigrate" else "the destination VMM holds no device state"
        except UnreachableError as error:
            lacks = error.problem
        move = Move(self._session, self._source, self._destination.vmm, self._journal)
        try:
            if lacks:
                await move.roll_back(FarfaultError(lacks))
            async with self._source.held(at_once=True):
                await self._attached.wait()
            await move.finish()
        except RolledBackError:
            await self._destination.discard()
            raise

    async def _run_if_paused(self) -> None:
        """The receiver died between its record of the hand-over and `cont`."""
        destination = await self._destination.connect()
        status = await destination.status()
        if status == "inmigrate":
            raise GuestWaitsError(
                "the destination VMM was started anew and holds no VM, although the VM was handed over to this host",
                "its state went with the VMM that had it; the page server still holds the memory of the switchover",
            )
        if status != "running":
            await destination.cont()

    async def _wait_for_release(self) -> None:
        """Every page had come. A VMM that was released already does not attach again: the wait for it is bounded."""
        try:
            async with asyncio.timeout(RELEASE_ATTACH_TIMEOUT_S):
                await self._attached.wait()
        except TimeoutError:
            logger.info("no VMM attached: it was released before")
