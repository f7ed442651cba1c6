"""The VM behind the memory: what the server needs of its VMM, and who may stop and start it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

import xxhash
from farfault.v1 import pages_pb2 as pb
from farfault_cli.errors import FarfaultError
from farfault_vmm.description import VmDescription

from farfault_server.leases.book import Lease
from farfault_server.leases.hold import Hold
from farfault_server.leases.keeper import LeaseKeeper
from farfault_server.leases.phases import TAKEN, Phase, Step
from farfault_server.leases.refusals import Code, RefusedError

logger = logging.getLogger(__name__)

RUNNING = "running"
DEVICE_STATE_BYTES_MAX = 1 << 30
CLOSE_TIMEOUT_S = 20.0
"""For a roll-back that is under way when the server ends."""
HOLD_INTERVAL_S = 1.0
"""How often it is looked whether a destination that is sent device state is still there."""
STILL_S_MAX = 0.1
"""So long after its VMM said that the VM stands still it is not asked again, unless it tells of a start."""
UNHEARD = "nothing was heard of the destination for as long as it had said: the VM runs again"


class SourceVmm(Protocol):
    """Control of a VMM; `farfault_vmm.qmp.QmpVmm` is one."""

    stopped_unix_us: int | None
    started_unix_us: int

    async def wait_started(self) -> None:
        """Returns when the vCPUs have started since the last call, whoever started them."""

    async def describe(self) -> VmDescription:
        """What the VM is."""

    async def prepare_source(self) -> None:
        """All that can be done for a move while the VM runs."""

    def suspend(self) -> AsyncIterator[bytes]:
        """Stops the VM and yields its device state; leaving it early lets the VM run again."""

    async def resume(self) -> None:
        """The VM runs again. Idempotent."""

    async def status(self) -> str:
        """The run state, ``running`` if it runs."""

    async def close(self) -> None:
        """Ends the control; the VM stays as it is."""


class GoneVmm:
    """The VMM of a VM that was handed over, and that has ended since: it can be asked nothing.

    Args:
        error: why; every method but `close` raises it.
    """

    stopped_unix_us: int | None = None
    started_unix_us = 0

    def __init__(self, error: FarfaultError) -> None:
        self._error = error

    async def wait_started(self) -> None:
        await asyncio.Event().wait()

    async def describe(self) -> VmDescription:
        raise self._error

    async def prepare_source(self) -> None:
        raise self._error

    async def suspend(self) -> AsyncIterator[bytes]:
        raise self._error
        yield b""

    async def resume(self) -> None:
        raise self._error

    async def status(self) -> str:
        raise self._error

    async def close(self) -> None:
        """There is nothing to end."""


class VmOwner:
    """Stops, starts and hands over the VM, each step on record first.

    A VM that a destination no longer holds is taken back by `take_back`. That is safe at any moment before the
    hand-over, for the same reasons as a Resume that the destination asks for:

    - RESUME and HAND_OVER exclude each other. Each is decided upon the newest record and made durable as one change of
      it (`LeaseKeeper.change`), and no phase that either leads to allows the other one (`leases.phases`). Our own lock
      only keeps the VMM from being told two things at a time: a call that is cancelled may leave it early.
    - The record says RESUMING, with a new generation, before the VM runs. A HandOver that comes later is refused, by
      its phase and by its generation, also by a server that was killed in between and started again.
    - A destination lets the VM run only after HandOver was answered with OK. One that is silent, cut off or dead has
      not had that answer, or the record says HANDED_OVER, and then nothing here resumes the VM.

    So how long to wait is a matter of patience, not of safety; no clock of another host comes into it.

    Args:
        vmm: None: the memory is a snapshot, or that of a VM stopped by other means.
        keeper: the record.
        clock: monotonic, in seconds.
    """

    def __init__(self, vmm: SourceVmm | None, keeper: LeaseKeeper, clock: Callable[[], float] = time.monotonic) -> None:
        self._vmm = vmm
        self._keeper = keeper
        self._clock = clock
        self._hold = Hold()
        self._lock = asyncio.Lock()
        self._answers = True
        self._still_at = float("-inf")  # the VMM said so, on our clock
        self._known_start_unix_us = 0
        self._is_known_to_run = False

    async def close(self) -> None:
        """Ends the control of the VMM, after a step that is under way."""
        if self._vmm is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S), self._lock:
                pass
        except TimeoutError:
            logger.error("a step of the VM is still under way: the next start of the server finishes it")
        await self._vmm.close()

    @property
    def vmm(self) -> SourceVmm:
        """The VMM.

        Raises:
            RefusedError: UNIMPLEMENTED, there is none.
        """
        if self._vmm is None:
            raise RefusedError(
                Code.UNIMPLEMENTED,
                "this page server has no control of a VMM",
                "start it with farfault serve --qmp PATH, or move only the memory",
            )
        return self._vmm

    async def describe(self) -> VmDescription:
        """Prepares the VM for a move, so that the description tells what will hold then."""
        if self._keeper.book.phase is Phase.RUNNING:
            await self.vmm.prepare_source()
        return await self.vmm.describe()

    async def suspend(self, lease: Lease, silence_s_max: float = 0) -> AsyncIterator[pb.DeviceStateChunk]:
        """Stops the VM and yields its device state. Left before the last chunk, the VM runs again.

        The last chunk is yielded while the record of it is being saved: the destination may load it meanwhile, and its
        HandOver waits for our lock. A server that is killed before the record is durable finds SUSPENDING when it
        starts again, takes the VM back, and refuses that HandOver.

        Args:
            lease: a migration lease.
            silence_s_max: how long the destination may be silent until the VM is taken back; 0: for ever.
        """
        vmm = self.vmm
        self._keeper.book.check_owner(lease)
        if self._lock.locked():
            raise RefusedError(Code.FAILED_PRECONDITION, "another call changes the VM now", "try again")
        async with self._lock:
            self._hold.renew(self._clock(), silence_s_max)
            await self._step(Step.SUSPEND)
            recording: asyncio.Future[None] | None = None
            try:
                async for chunk in self._device_state(vmm):
                    if chunk.last:
                        recording = asyncio.ensure_future(self._state_sent(vmm))
                    yield chunk
                if recording is not None:
                    await asyncio.shield(recording)
                    logger.info("the VM is stopped, its device state is sent")
            finally:
                if recording is not None:  # the destination may hold it all by now, however it has left
                    await asyncio.wait({recording})
                if self._keeper.book.phase is not Phase.FROZEN:
                    logger.warning("the device state was not sent whole: the VM runs again")
                    await asyncio.shield(asyncio.ensure_future(self._resume()))

    async def _device_state(self, vmm: SourceVmm) -> AsyncIterator[pb.DeviceStateChunk]:
        hashed = xxhash.xxh3_64()
        size_bytes = 0
        generation = self._keeper.book.generation
        async with aclosing(vmm.suspend()) as chunks:  # type: ignore[type-var]
            async for data in chunks:
                if not size_bytes:
                    self._keeper.mark_stopped()
                hashed.update(data)
                size_bytes += len(data)
                if size_bytes > DEVICE_STATE_BYTES_MAX:
                    raise FarfaultError(
                        f"the device state is longer than {DEVICE_STATE_BYTES_MAX >> 20} MiB",
                        "RAM seems to travel in it: back it with share=on",
                    )
                yield _chunk(vmm, generation, data)
        last = _chunk(vmm, generation, b"")
        last.last, last.checksum = True, hashed.intdigest()
        yield last

    async def _state_sent(self, vmm: SourceVmm) -> None:
        """On record; and the VMM is asked what the HandOver wants to know, while the destination loads the state."""
        identity = [region.identity() for region in self._keeper.memory.regions]
        recording = self._keeper.change(lambda book: (book.step(Step.STATE_SENT, identity), None))
        recorded, _ = await asyncio.gather(recording, self._ask_whether_it_runs(vmm), return_exceptions=True)
        if isinstance(recorded, BaseException):
            raise recorded

    def hold(self, lease: Lease, silence_s_max: float) -> None:
        """The destination is there, and may be silent for so long from now on; 0: for ever.

        Raises:
            RefusedError: the VM does not stand still for it.
        """
        _ = self.vmm
        self._keeper.book.check_owner(lease)
        phase = self._keeper.book.phase
        if phase not in (Phase.SUSPENDING, Phase.FROZEN):
            raise RefusedError(
                Code.FAILED_PRECONDITION,
                f"the source VM does not wait for this destination: it is {phase.value}",
                "see that the link works, then try again",
            )
        self._hold.renew(self._clock(), silence_s_max)

    @property
    def held_for_s(self) -> float:
        """How long the VM still stands still for a silent destination; infinite where it is not to be taken back."""
        return self._hold.left_s(self._clock()) if self._keeper.book.phase in TAKEN else math.inf

    async def while_held(self, sending: asyncio.Future[None]) -> None:
        """Waits for a task that sends the device state; a destination that is not heard of ends it.

        Raises:
            RefusedError: that happened; the VM runs again.
        """
        try:
            while not sending.done():
                left_s = self.held_for_s
                if left_s == 0:
                    raise RefusedError(Code.FAILED_PRECONDITION, UNHEARD, "see that the link works, then try again")
                await asyncio.wait({sending}, timeout=min(left_s, HOLD_INTERVAL_S))
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        await sending

    async def take_back(self) -> None:
        """A VM that its destination no longer holds runs again. It does nothing before that, or after the hand-over."""
        if self.held_for_s > 0:
            return
        # A server that ends now must not leave the VM between two steps: `close` waits for the lock.
        await asyncio.shield(asyncio.ensure_future(self._take_back()))

    async def _take_back(self) -> None:
        async with self._lock:  # a Suspend that is under way is ended by `while_held`
            if self.held_for_s == 0:  # still: whoever had the lock may have handed the VM over, or resumed it
                logger.warning(UNHEARD)
                await self._resume()

    async def hand_over(self, lease: Lease, generation: int) -> None:
        """The destination owns the VM when this returns."""
        vmm = self.vmm
        self._keeper.book.check_owner(lease)
        async with self._lock:
            book = self._keeper.book
            book.check_hand_over(generation)
            if book.phase is Phase.FROZEN and await self._runs(vmm, STILL_S_MAX):
                await self._found_running()
                raise RefusedError(
                    Code.FAILED_PRECONDITION,
                    "the source VM runs: somebody resumed it past the page server",
                    "its device state is stale; suspend again",
                )
            await self._step(Step.HAND_OVER)
        logger.info("the VM is handed over: the destination owns it")

    async def resume(self, lease: Lease) -> None:
        """Rolls back."""
        _ = self.vmm
        self._keeper.book.check_owner(lease)
        async with self._lock:
            await self._resume()

    async def ensure_running(self) -> None:
        """Before a migration lease is given back: a VM that was suspended runs again."""
        if self._vmm is None:
            return
        async with self._lock:
            if self._keeper.book.phase in TAKEN:
                await self._resume()

    async def recover(self, *, abandon: bool = False) -> None:
        """At the start of the server: brings record and VM together.

        Args:
            abandon: a VM that was suspended for a destination runs again, unless it was handed over.

        Raises:
            FarfaultError: the VMM cannot be asked.
        """
        phase = self._keeper.book.phase
        if self._vmm is None:
            return
        async with self._lock:
            if phase in (Phase.SUSPENDING, Phase.RESUMING):
                logger.warning("the server ended in the middle of a suspend or resume: the VM runs again")
                await self._resume()
            elif phase is Phase.FROZEN and abandon:
                logger.warning("the suspended VM is taken back from its destination: it runs again")
                await self._resume()
        await self.check_stopped()

    async def check_stopped(self) -> None:
        """Looks whether the VM, which should stand still, was started past the server; then its memory is another."""
        if self._vmm is None or not self._keeper.book.is_stopped or self._lock.locked():
            return
        async with self._lock:
            if not self._keeper.book.is_stopped:
                return
            runs, was_known = await self._runs(self._vmm), self._is_known_to_run
            self._is_known_to_run = runs
            if runs and not was_known:  # its memory stays of no generation as long as it runs
                await self._found_running()

    async def wait_started(self, timeout_s: float) -> None:
        """Returns when somebody starts the VM, at the latest after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self.vmm.wait_started()
        except TimeoutError:
            return

    async def _found_running(self) -> None:
        logger.error("the source VM runs although it was stopped for a move: its pages are of a new generation")
        await self._step(Step.FOUND_RUNNING)

    async def _runs(self, vmm: SourceVmm, still_s_max: float = 0) -> bool:
        """Whether the VM runs, or has run since we stopped it or were last told so.

        Args:
            still_s_max: it is not asked again where it stood still so short a time ago; it tells of a start by itself.
        """
        started_unix_us = vmm.started_unix_us
        if vmm.stopped_unix_us is not None and started_unix_us > max(vmm.stopped_unix_us, self._known_start_unix_us):
            self._known_start_unix_us = started_unix_us
            self._is_known_to_run = False
            return True
        if self._clock() - self._still_at <= still_s_max:
            return False
        return await self._ask_whether_it_runs(vmm)

    async def _ask_whether_it_runs(self, vmm: SourceVmm) -> bool:
        """A VMM that does not answer any more does not run its VM."""
        self._still_at = float("-inf")
        try:
            is_running = await vmm.status() == RUNNING
        except FarfaultError as error:
            if self._answers:
                logger.warning("the source VMM does not answer: %s", error.problem)
            self._answers = False
            return False
        self._answers = True
        if not is_running:
            self._still_at = self._clock()
        return is_running

    async def _resume(self) -> None:
        await self._step(Step.RESUME)
        if self._keeper.book.phase is Phase.RESUMING:
            self._still_at = float("-inf")
            await self.vmm.resume()
            await self._step(Step.RESUMED)
            logger.info("the VM runs again")

    async def _step(self, step: Step) -> None:
        await self._keeper.change(lambda book: (book.step(step), None))


def _chunk(vmm: SourceVmm, generation: int, data: bytes) -> pb.DeviceStateChunk:
    """A piece of the device state, and how long the VM has stood still (the other host's clock may differ)."""
    chunk = pb.DeviceStateChunk(data=data, generation=generation)
    if vmm.stopped_unix_us is not None:
        chunk.stopped_unix_us = vmm.stopped_unix_us
        chunk.stopped_for_us = max(1, time.time_ns() // 1000 - vmm.stopped_unix_us)
    return chunk
