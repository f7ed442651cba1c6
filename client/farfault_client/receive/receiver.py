"""The receiver of one VM: waits for its VMM, moves it in, streams the rest of its memory, says Complete.

It may die at any moment: the VMM keeps its userfaultfd open and its guest waits; the next receiver with the same
state folder takes the lease up again, rebuilds the set of installed pages from the kernel, and goes on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farfault.v1 import pages_pb2 as pb
from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError, PreflightError, RolledBackError
from farfault_shim.attach.listener import AttachListener
from farfault_shim.attach.vmm import AttachedVmm
from farfault_shim.attach.wire import VcpuCounters
from farfault_shim.layout import PageRun

from farfault_client.engine import EngineConfig
from farfault_client.receive.destination import Destination
from farfault_client.receive.digest import RamDigest
from farfault_client.receive.endings import wrong
from farfault_client.receive.journal import Journal, Record, Step
from farfault_client.receive.move import Move
from farfault_client.receive.pager import Pager, layout_text
from farfault_client.receive.preflight import check, failed, memory_checks, vm_checks
from farfault_client.receive.recovery import Recovery
from farfault_client.receive.removed_log import RemovedLog
from farfault_client.receive.source import SourceVm
from farfault_client.receive.status import Progress, status_of
from farfault_client.receive.working_set import read_hints
from farfault_client.session.session import Session, SessionConfig

logger = logging.getLogger(__name__)

PREFLIGHT_ATTACH_TIMEOUT_S = 10.0
"""A preflight waits this long for a VMM to attach: it retries ten times a second."""
LANES_TIMEOUT_S = 5.0
"""And so long for its lanes: a move that begins before them lets the guest wait for the rest of their way."""
ABORT_TIMEOUT_S = 20.0
"""For the source VM to run again; the page server may be out of reach."""


@dataclass(frozen=True, slots=True)
class ReceiverConfig:
    """What a receiver is told.

    Attributes:
        session: how to reach the page server.
        attach: unix socket on which the VMM attaches.
        qmp: the destination VMM's QMP socket; None: memory only, nothing is stopped or started.
        state: folder of the journal.
        engine: bounds, bandwidth cap.
        hints: working set of an earlier move, fetched ahead of the rest.
        allowed_uids: users whose VMMs may attach, besides root and our own.
        verify: compare all of RAM with the page server's before Complete.
    """

    session: SessionConfig
    attach: Path
    qmp: Path | None
    state: Path
    engine: EngineConfig = field(default_factory=EngineConfig)
    hints: Path | None = None
    allowed_uids: Collection[int] = ()
    verify: bool = False


class Receiver:
    """See the module. `start`, then `move` (or `serve_memory`), then `finish`; `close` at the end.

    Attributes:
        progress: what `status` reports besides the pager's figures.
        changed: set and renewed at each change of phase, for watchers.
    """

    def __init__(self, config: ReceiverConfig) -> None:
        self.config = config
        self.journal = Journal(config.state)
        self.journal.lock()
        self._removed = RemovedLog(config.state / "removed")
        self.session = Session(config.session, self._connection_changed)
        self.source = SourceVm(self.session)
        self.progress = Progress()
        self.changed = asyncio.Event()
        self.pager: Pager | None = None
        self._digest: RamDigest | None = None
        self._hints: list[PageRun] = []
        self._vmm: AttachedVmm | None = None
        self._attached = asyncio.Event()
        self._listener: AttachListener | None = None
        self._destination = Destination(config.qmp, self._kill_vmm)
        self._recovery = Recovery(
            self.session, self.source, self._destination, self.journal, self._removed, self._attached
        )
        self._moving: asyncio.Task[None] | None = None
        self._abort_asked = False
        self._vmm_exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._vmm_pidfd = -1

    # ---- beginning and end -----------------------------------------------------------------------

    async def start(self) -> Step:
        """Opens the lease (or takes it up again), listens for the VMM. Returns the step that the move is in.

        Raises:
            UsageError: the attach socket cannot be listened on.
            UnreachableError, FarfaultError: the page server does not answer, or refuses.
        """
        record = self._recovery.find()
        if record is None:
            lease, target = await self.session.open(), self.config.session.peer.target
            step = Step.OPENED
            self._removed.forget()
            self.journal.write(Record(step, target, lease.lease_id, lease.token, lease.generation))
        else:
            step = record.step
            logger.info("taking up the move that was %s", step.value)
            await self._recovery.reopen(record)
        assert self.session.lease is not None
        if self.config.verify:
            self._digest = RamDigest(self.session.lease.layout)
        self.pager = Pager(self.session, self.config.engine, self._removed.append, self._digest)
        if self.config.hints is not None:
            self._hints = read_hints(self.config.hints, self.pager.layout.page_count)
        self._listener = await AttachListener.start(
            self.config.attach, self._on_attached, self._on_detached, self.config.allowed_uids
        )
        self.session.start(self.pager)
        logger.info("lease on %s; waiting for a VMM at %s", layout_text(self.session.lease.layout), self.config.attach)
        return step

    async def close(self) -> None:
        """Ends connections and listening. The lease, the journal and the VMM stay as they are."""
        if self._listener is not None:
            await self._listener.close()
        await self._destination.close()
        self._removed.close()
        self._forget_exit()
        await self.session.close()
        if self.pager is not None:
            self.pager.close()
        self.journal.unlock()

    async def give_back(self) -> None:
        """Nothing was moved: the lease is released and forgotten."""
        if self.journal.record is not None and self.journal.record.step in (Step.OPENED, Step.ROLLED_BACK):
            try:
                await self.source.release()
            except FarfaultError as error:
                logger.warning("lease not given back: %s", error.problem)
            self.journal.forget()

    # ---- the move --------------------------------------------------------------------------------

    async def preflight(self) -> list[rpb.Check]:
        """All checks. Waits a bounded time for the VMM to attach."""
        try:
            async with asyncio.timeout(PREFLIGHT_ATTACH_TIMEOUT_S):
                await self._attached.wait()
        except TimeoutError:
            pass  # the check below says so
        if not await self.session.wait_ready(LANES_TIMEOUT_S):
            logger.warning("not all lanes are connected after %g s; the move begins all the same", LANES_TIMEOUT_S)
        target = self.config.session.peer.target
        checks = [check("page server", self.session.connected or self.session.error is None, f"{target} answers")]
        checks += memory_checks(self.session, self._vmm)
        if self.config.qmp is not None:
            try:
                destination = await self._destination.connect()
                await destination.prepare_destination()
                checks += await vm_checks(self.source, await destination.describe())
            except FarfaultError as error:
                checks.append(check("destination VMM", False, error.problem, error.remedy))
        self.progress.checks = checks
        return checks

    async def move(self) -> None:
        """Preflight, switchover, and the rest of memory.

        Raises:
            PreflightError: refused before anything was stopped.
            RolledBackError: failed before the point of no return.
            FarfaultError: failed otherwise.
        """
        self._phase(rpb.PHASE_PREFLIGHT)
        bad = failed(await self.preflight())
        if bad:
            raise PreflightError("; ".join(f"{line.name}: {line.detail}" for line in bad), bad[0].remedy)
        if self._abort_asked:
            raise RolledBackError("the move was aborted before the switchover; the source VM runs as before")
        self._phase(rpb.PHASE_SWITCHOVER)
        assert self._destination.vmm is not None
        move = Move(self.session, self.source, self._destination.vmm, self.journal)
        self._moving = asyncio.get_running_loop().create_task(move.run(), name="switchover")
        try:
            await self._moving
        except RolledBackError:
            await self._destination.discard()
            raise
        finally:
            self._moving = None
        self.progress.downtime_ms = move.downtime_s * 1e3
        await self._stream()

    async def serve_memory(self) -> None:
        """Without VMM control: pages flow as soon as a VMM attaches."""
        await self._attached.wait()
        self.journal.step(Step.RUNNING)
        await self._stream()

    async def take_up(self, step: Step) -> None:
        """Goes on where the receiver before us was interrupted. Raises what `Recovery.settle` does."""
        await self._recovery.settle(step)
        if step is Step.COMPLETED:
            await self._complete()
        else:
            await self._stream()

    async def abort(self) -> None:
        """Stops a move that has not come to the point of no return. When it returns the source VM runs as before.

        Raises:
            FarfaultError: there is none to stop, it is too late, or the source cannot be asked; says which.
        """
        self._check_not_too_late()
        moving = self._moving
        if moving is None:
            if self.progress.phase != rpb.PHASE_PREFLIGHT:
                raise FarfaultError("no move is under way", "nothing to abort: the source VM runs")
            self._abort_asked = True
            return
        if not moving.cancelling():
            moving.cancel()
        _, waiting = await asyncio.wait({moving}, timeout=ABORT_TIMEOUT_S)
        if waiting:
            raise FarfaultError(
                f"the page server did not bring the source VM back within {ABORT_TIMEOUT_S:g} s",
                "the receiver goes on asking; see that `farfault serve` runs on the source host",
            )
        self._check_not_too_late()  # it had been done before it could be stopped
        error = moving.exception()
        if isinstance(error, FarfaultError) and not isinstance(error, RolledBackError):
            raise error

    def status(self, map_cells: int = 0) -> rpb.MigrationStatus:
        """Everything that is known now."""
        return status_of(self.progress, self.session, self.pager, self._vmm, map_cells)

    def vcpu_counters(self) -> dict[int, VcpuCounters]:
        """The shim's counters by vCPU; empty while no VMM is attached."""
        return self._vmm.counters() if self._vmm is not None else {}

    def set_bandwidth(self, bytes_per_s: int) -> None:
        """Caps the background lane from now on; 0: no cap."""
        assert self.pager is not None
        self.pager.engine.rate.bytes_per_s = bytes_per_s

    def fail(self, error: FarfaultError) -> None:
        """Records how it ended."""
        self.progress.failed(error, rpb.PHASE_FAILED)
        self._notify()

    # ---- within ----------------------------------------------------------------------------------

    def _check_not_too_late(self) -> None:
        record = self.journal.record
        if record is not None and record.vm_may_be_here:
            raise FarfaultError(
                f"too late, the move is past the point of no return ({record.step.value}): the newest state of the VM "
                "is on this host and the source must not run again",
                "let the move finish; to bring the VM back, migrate it in the other direction",
            )

    async def _stream(self) -> None:
        """The guest runs; brings the rest, and ends."""
        assert self.pager is not None
        self.progress.running()
        self._phase(rpb.PHASE_POSTCOPY)
        for run in self._hints:
            self.pager.engine.hint(run)
        self.pager.start_background()
        await self._all_installed()
        self.progress.streamed()
        await self._verify()
        self.pager.unregister()
        self.journal.step(Step.COMPLETED)
        await self._complete()

    async def _all_installed(self) -> None:
        """Waits for the last page. A VMM that only lost its connection comes back; one that has exited does not."""
        assert self.pager is not None
        finished = asyncio.get_running_loop().create_task(self.pager.finished.wait())
        waits: set[asyncio.Future[Any]] = {finished, self._vmm_exited}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished.cancel()
        if not self.pager.finished.is_set():
            raise FarfaultError(
                "the destination VMM has exited in the middle of the move",
                "see its log; the page server still holds the memory as it was at the switchover",
            )

    async def _verify(self) -> None:
        """Compares memory with the page server's, if that was asked for. A difference is remembered for good.

        Raises:
            VerificationError: they differ; Complete is never said.
        """
        if self._digest is None:
            return
        assert self.pager is not None
        for chunk in self._digest.chunks(self.pager.engine.pages):
            theirs = await self.source.digest(chunk.region, chunk.runs)
            if theirs != chunk.digest:
                self.journal.step(Step.WRONG)
                raise wrong(f"{chunk} are not what the page server holds")
            self.progress.verified_pages += chunk.page_count
        total = self.pager.layout.page_count
        logger.info("verified: %d of %d pages are what the page server holds", self.progress.verified_pages, total)

    async def _complete(self) -> None:
        assert self.pager is not None
        stats = self.pager.engine.stats
        await self.source.complete(
            pb.CompleteRequest(
                generation=self.session.key.generation,
                installed_pages=stats.installed_pages,
                zero_pages=stats.zero_pages,
            )
        )
        if self._vmm is not None:
            self._vmm.release()
        self.journal.forget()
        self._removed.forget()
        self._phase(rpb.PHASE_DONE)

    def _on_attached(self, vmm: AttachedVmm) -> None:
        assert self.pager is not None
        if self._vmm is not None:
            vmm.refuse(f"the VMM with pid {self._vmm.pid} is attached already")
            return
        try:
            if self.journal.vm_may_be_here:
                self._recovery.rebuild(self.pager, vmm)
            self.pager.attach(vmm)
        except ValueError as error:
            logger.error("VMM with pid %d refused: %s", vmm.pid, error)
            self.progress.message = str(error)
            vmm.refuse(str(error))
            return
        self._vmm = vmm
        self._watch_exit(vmm.pid)
        self._attached.set()
        logger.info("VMM with pid %d attached, fault source %s", vmm.pid, vmm.fault_source.value)
        self.progress.fault_source = vmm.fault_source.value
        self._notify()

    def _on_detached(self, vmm: AttachedVmm) -> None:
        if self._vmm is not vmm:
            return
        assert self.pager is not None
        self.pager.detach()
        self._vmm = None
        self._attached.clear()
        if self.progress.phase != rpb.PHASE_DONE:
            logger.warning("the VMM with pid %d detached", vmm.pid)
        self._notify()

    def _watch_exit(self, pid: int) -> None:
        """Notices the end of the VMM's process, which losing its connection need not be.

        A process that has ended and was not waited for yet still has its number: only a pidfd tells (pidfd_open(2)).
        """
        self._forget_exit()
        if self._vmm_exited.done():
            self._vmm_exited = asyncio.get_running_loop().create_future()
        try:
            self._vmm_pidfd = os.pidfd_open(pid)
        except OSError as error:
            logger.warning("the end of the VMM with pid %d would go unnoticed: %s", pid, error.strerror)
            return
        asyncio.get_running_loop().add_reader(self._vmm_pidfd, self._on_exited)

    def _on_exited(self) -> None:
        self._forget_exit()
        if not self._vmm_exited.done():
            self._vmm_exited.set_result(None)

    def _kill_vmm(self) -> None:
        if self._vmm_pidfd < 0:
            return
        try:
            signal.pidfd_send_signal(self._vmm_pidfd, signal.SIGKILL)
        except OSError as error:
            logger.warning("the destination VMM cannot be killed: %s", error.strerror)

    def _forget_exit(self) -> None:
        if self._vmm_pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._vmm_pidfd)
            os.close(self._vmm_pidfd)
            self._vmm_pidfd = -1

    def _connection_changed(self, connected: bool) -> None:
        if connected:
            logger.info("page server connected")
        elif self.progress.phase not in (rpb.PHASE_DONE, rpb.PHASE_FAILED):
            logger.info("page server out of reach; faults wait")
        self._notify()

    def _phase(self, phase: rpb.Phase) -> None:
        self.progress.phase = phase
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()
