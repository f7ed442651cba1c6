"""One VMM under control: what both the page server and the receiver need of it.

The source side, around a generator that stops the VM and yields its device state::

    vmm = await QmpVmm.connect("/run/vm.qmp")
    await vmm.prepare_source()
    async with aclosing(vmm.suspend()) as chunks:
        async for chunk in chunks:
            ...                 # leaving early, or an error, lets the VM run on as before
    await vmm.resume()          # rolls back later, if the destination refuses

The destination side::

    vmm = await QmpVmm.connect("/run/vm.qmp")
    await vmm.prepare_destination()
    await vmm.load(chunks)      # `chunks` is first asked when the VMM already listens
    resumed_unix_us = await vmm.cont()

QEMU is told to save a VM that still runs, and stops it itself when all but the device state is written: what it does
first (dirty logging of all RAM, waits for RCU) then costs the guest no time. ``tests/vmm/measure_downtime.py`` measures
that; on QEMU 7.2 under KVM, both on one 2-core host that other work kept busy, medians of 30 moves: 6.6 ms stopped
first, 3.3 ms saved while it runs, 5.0 ms with pause-before-switchover. What follows from it:

- Nothing of the device state is passed on before the event STOP, so whoever gets the first byte knows that the VM
  stands still. A VM that QEMU has not stopped in `STOP_AFTER_S` is stopped by us.
- Until QEMU has told that it is done it lets the VM run again by itself when the migration fails or is cancelled, or
  when nobody reads any more because we were killed. So the state counts as saved only after that (``postmigrate``);
  from there nothing but ``cont`` runs the VM.
- The run state travels as running. The destination does not start on its own all the same: see `prepare_destination`.

Other VMMs are stopped first and saved then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from types import TracebackType

from farfault_cli.errors import FarfaultError, PreflightError, UnreachableError
from qemu.qmp import EventListener

from farfault_vmm.connection import CommandError, Event, QmpConnection
from farfault_vmm.description import DESTINATION_STATUS, IGNORE_SHARED, MemoryBackend, VmDescription

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
EVENT_TIMEOUT_S = 10.0
"""For STOP, RESUME, and the end of a migration that was cancelled."""
STOP_AFTER_S = 1.0
"""A VM that is saved while it runs, and that its VMM has not stopped by then, is stopped by us."""
EARLY_BYTES_MAX = 64 << 20
"""So is one of which so much was saved while it ran."""
SAVE_TIMEOUT_S = 60.0
"""For the next bytes of the device state from the source VMM."""
LOAD_TIMEOUT_S = 120.0
"""For the device state into the destination VMM, pages that it has to wait for included."""
QUIT_TIMEOUT_S = 10.0

CHUNK_BYTES_MAX = 256 << 10
DEVICE_STATE_BYTES_MAX = 1 << 30
"""Far more than devices have; more means that RAM travels in the device state."""

CONT_ATTEMPTS_MAX = 100
CONT_PAUSE_S = 0.02
"""QEMU refuses ``cont`` for the moment in which a failed migration is being tidied up, and tells no end of it."""

STATE_FD_NAME = "farfault-state"
STATE_URI = f"fd:{STATE_FD_NAME}"
RUNNING = "running"
PAUSED = "paused"
SETTLED = frozenset({"", "none", "completed", "failed", "cancelled"})
"""Migration statuses in which nothing is under way."""


class QmpVmm:
    """A VMM on the other end of a QMP connection. Use as an async context manager, or `close` it.

    Every method raises `UnreachableError` when the VMM is gone or does not answer within the bound that the module
    names, and `farfault_vmm.connection.CommandError` when it refuses a command.

    Attributes:
        stopped_unix_us: when the VM stopped, by its host's clock; None before `suspend` has stopped it.
        started_unix_us: when its vCPUs started last, whoever started them, by the same clock; 0: not since `connect`.
    """

    def __init__(self, connection: QmpConnection) -> None:
        self.stopped_unix_us: int | None = None
        self.started_unix_us = 0
        self._started = asyncio.Event()
        self._connection = connection
        self._watcher = asyncio.create_task(self._watch_starts(), name="watch starts of the VM")

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], timeout_s: float = CONNECT_TIMEOUT_S) -> QmpVmm:
        """Connects to the QMP socket of a VMM.

        Raises:
            UnreachableError: it can not be had; the remedy says what to do.
        """
        return cls(await QmpConnection.connect(path, timeout_s))

    async def __aenter__(self) -> QmpVmm:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; the VM stays as it is. Idempotent."""
        self._watcher.cancel()
        await self._connection.close()

    async def wait_closed(self) -> None:
        """Returns when the connection is gone: the VMM has ended, or `close` was called."""
        await self._connection.wait_lost()

    async def wait_started(self) -> None:
        """Returns when the vCPUs have started since the last call, whoever started them."""
        await self._started.wait()
        self._started.clear()

    async def _watch_starts(self) -> None:
        with self._connection.events("RESUME") as events:
            while True:
                self.started_unix_us = Event.of_message(await events.get()).unix_us
                self._started.set()

    # ---- both sides ------------------------------------------------------------------------------

    async def describe(self) -> VmDescription:
        """What the VM is, for `compare`. Call it after the `prepare_*` of its side: it lists what is on."""
        execute = self._connection.execute
        machine_type = await execute("qom-get", {"path": "/machine", "property": "type"})
        backends = await execute("query-memdev")
        kvm = await execute("query-kvm")
        capabilities = await execute("query-migrate-capabilities")
        try:
            return VmDescription(
                vmm=_name_and_version(self._connection.version),
                # The type in QEMU's object model carries the versioned name, whatever alias was given to -machine.
                machine_type=str(machine_type).removesuffix("-machine"),
                vcpus=len(await execute("query-cpus-fast")),
                status=await self.status(),
                memory=tuple(MemoryBackend(item.get("id", ""), item["size"], item["share"]) for item in backends),
                capabilities=tuple(item["capability"] for item in capabilities if item["state"]),
                accelerator="kvm" if kvm["enabled"] else "tcg",
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise FarfaultError(
                f"the VMM at {self._connection.path} describes itself in a way that is not QMP: {error!r}",
                "the documentation of the package farfault_vmm lists the replies that a VMM must give",
            ) from error

    async def status(self) -> str:
        """The run state: ``running``, ``paused``, ``inmigrate``, ``postmigrate`` ..."""
        return str((await self._connection.execute("query-status"))["status"])

    async def stop(self) -> None:
        """Stops the vCPUs. No error where they stand already."""
        await self._connection.execute("stop")

    async def cont(self) -> int:
        """Lets the vCPUs run.

        Returns:
            When they started, Unix time in microseconds by the VMM's clock.
        """
        with self._connection.events("RESUME") as events:
            await self._continue()
            # QEMU tells the start before it answers. A VM that ran already starts no more, which is the rare case.
            if events.empty() and await self.status() == RUNNING and events.empty():
                return _now_us()
            return (await self._connection.next_event(events, EVENT_TIMEOUT_S, "the start of the vCPUs")).unix_us

    async def quit(self) -> None:
        """Ends the VMM and waits until its connection is gone."""
        with suppress(UnreachableError):  # gone before it answered
            await self._connection.execute("quit")
        try:
            async with asyncio.timeout(QUIT_TIMEOUT_S):
                await self.wait_closed()
        except TimeoutError as error:
            raise UnreachableError(
                f"the VMM at {self._connection.path} did not end in {QUIT_TIMEOUT_S:g} s", "end its process"
            ) from error

    # ---- source ----------------------------------------------------------------------------------

    async def prepare_source(self) -> None:
        """Sets the migration up as far as a running VM allows. The capabilities stay on. Idempotent.

        Raises:
            PreflightError: the VMM can not leave shared memory out of the device state.
        """
        await self._set_capabilities()

    async def suspend(self) -> AsyncGenerator[bytes, None]:
        """Stops the VM and yields its device state; `stopped_unix_us` is set before the first chunk.

        The VM's memory does not change from the first chunk on. After the last one the VM is in the state
        ``postmigrate`` and stays there until `resume`. Anything else than reaching the end (an error, a
        cancellation, ``aclose()``) cancels the migration, and a VM that ran before runs again.

        QEMU saves a VM once: after a failure or `cancel`, one that was paused has to run before it can be saved again.

        Yields:
            Chunks of at most `CHUNK_BYTES_MAX` bytes, at least one.

        Raises:
            FarfaultError: the VMM could not save its state; the message has its reason.
        """
        await self.prepare_source()
        was_running = await self.status() == RUNNING
        ours, theirs = socket.socketpair()
        with ours, theirs, self._connection.events("STOP", "MIGRATION") as events:
            ours.setblocking(False)
            await self._connection.pass_descriptor(theirs.fileno(), STATE_FD_NAME)
            theirs.close()
            self.stopped_unix_us = _now_us()
            saves_running = was_running and self._connection.is_qemu
            commands = asyncio.create_task(self._migrate(stop_first=not saves_running), name="save the device state")
            # A command that is refused makes no end of the device state: so end it here.
            commands.add_done_callback(lambda done: _shut(ours) if _has_failed(done) else None)
            try:
                early = _Early(ours)
                if was_running:
                    with early:
                        await self._wait_stopped(events, commands, early.is_full if saves_running else None)
                size_bytes = 0
                async for chunk in early.then_the_rest():
                    size_bytes += len(chunk)
                    _check_size(size_bytes)
                    yield chunk
                await commands
                await self._wait_saved(events)
            except BaseException:
                # Also GeneratorExit and CancelledError: the VM must not stay stopped because a client left.
                ours.close()
                await asyncio.shield(asyncio.create_task(self._roll_back(commands, was_running), name="roll back"))
                raise

    async def cancel(self) -> None:
        """Ends a migration that is under way and waits until it has ended; the vCPUs stay stopped. Idempotent."""
        await self._connection.execute("migrate_cancel")
        with self._connection.events("MIGRATION") as events:
            status = (await self._connection.execute("query-migrate")).get("status", "")
            while status not in SETTLED:
                status = (
                    await self._connection.next_event(events, EVENT_TIMEOUT_S, "the end of a cancelled migration")
                ).status

    async def resume(self) -> None:
        """Rolls back: ends a migration that is under way and lets the VM run. Idempotent."""
        await self.cancel()
        if await self.status() != RUNNING:
            await self.cont()

    # ---- destination -----------------------------------------------------------------------------

    async def prepare_destination(self) -> None:
        """Sets the VMM up to receive, and not to start the VM before `cont`. Idempotent.

        Raises:
            PreflightError: it was not started to receive, or can not leave shared memory out.
        """
        status = await self.status()
        if status != DESTINATION_STATUS:
            raise PreflightError(
                f"the destination VMM at {self._connection.path} does not wait for a VM: its status is {status!r}",
                "start it with -incoming defer",
            )
        # Until a VM is loaded, `stop` only means that it shall not start on its own then (QEMU: qmp_stop, autostart).
        await self.stop()
        await self._set_capabilities()

    async def load(self, chunks: AsyncIterator[bytes]) -> None:
        """Loads a device state; afterwards the VM is ``paused`` and `cont` lets it run.

        The first chunk is asked for when the VMM already listens, so that an iterator which stops the source at
        that moment loses no time. It is read to its end, or closed on failure. After a failed load the VMM can
        not be used again: QEMU ends itself.

        Args:
            chunks: what `suspend` of the source yielded.

        Raises:
            FarfaultError: the VMM refused the state, or the VM started on its own; whatever `chunks` raises.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs, self._connection.events("MIGRATION", "RESUME") as events:
            ours.setblocking(False)
            await self._connection.pass_descriptor(theirs.fileno(), STATE_FD_NAME)
            theirs.close()
            try:
                await self._connection.execute("migrate-incoming", {"uri": STATE_URI})
            except CommandError as error:
                raise _not_loaded(error.description) from error
            feeding = asyncio.create_task(_feed(ours, chunks), name="feed device state")
            loading = asyncio.create_task(self._wait_loaded(events), name="load device state")
            try:
                _, waiting = await asyncio.wait(
                    {feeding, loading}, timeout=LOAD_TIMEOUT_S, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in {feeding, loading} - waiting:
                    task.result()
                if waiting:
                    raise _not_loaded(f"it took longer than {LOAD_TIMEOUT_S:g} s, perhaps for pages that did not come")
            finally:
                feeding.cancel()
                loading.cancel()
                await asyncio.gather(feeding, loading, return_exceptions=True)

    # ---- steps -----------------------------------------------------------------------------------

    async def _set_capabilities(self) -> None:
        wanted = [{"capability": name, "state": True} for name in (IGNORE_SHARED, "events")]
        try:
            await self._connection.execute("migrate-set-capabilities", {"capabilities": wanted})
        except CommandError as error:
            raise PreflightError(
                f"the VMM at {self._connection.path} can not leave shared memory out: {error.description}",
                "use QEMU 4.0 or later, and no other migration may be under way",
            ) from error

    async def _migrate(self, *, stop_first: bool) -> None:
        """With a stop both commands go out together: one round trip less while the VM stands still."""
        names: list[tuple[str, dict[str, object] | None]] = [("migrate", {"uri": STATE_URI})]
        if stop_first:
            names.insert(0, ("stop", None))
        commands = [asyncio.ensure_future(self._connection.execute(*name)) for name in names]
        try:
            for command in commands:
                await command
        finally:
            await asyncio.gather(*commands, return_exceptions=True)

    async def _wait_stopped(
        self, events: EventListener, commands: asyncio.Task[None], is_full: asyncio.Event | None
    ) -> None:
        """Until STOP. It comes before any byte of device state, and well before the replies to the commands.

        Args:
            is_full: of a VM that is saved while it runs: enough has been.
        """
        event = asyncio.create_task(self._next_stop(events))
        stopping = asyncio.create_task(self._stop_late(is_full)) if is_full is not None else None
        try:
            await asyncio.wait({event, commands}, return_when=asyncio.FIRST_COMPLETED)
            if _has_failed(commands):
                commands.result()
            self.stopped_unix_us = (await event).unix_us
        finally:
            event.cancel()
            if stopping is not None:
                stopping.cancel()
                await asyncio.gather(stopping, return_exceptions=True)

    async def _stop_late(self, is_full: asyncio.Event) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_AFTER_S):
                await is_full.wait()
        logger.warning("the VMM saves and does not stop the VM: it is stopped")
        await self.stop()

    async def _next_stop(self, events: EventListener) -> Event:
        while True:
            event = await self._connection.next_event(events, EVENT_TIMEOUT_S, "the stop of the vCPUs")
            if event.name == "STOP":
                return event
            if event.status in ("failed", "cancelled"):
                raise await self._not_saved(event.status)

    async def _wait_saved(self, events: EventListener) -> None:
        event = Event("", "", 0)
        while event.status not in SETTLED - {""}:
            event = await self._connection.next_event(events, EVENT_TIMEOUT_S, "the end of saving the device state")
        if event.status != "completed":
            raise await self._not_saved(event.status)

    async def _not_saved(self, status: str) -> FarfaultError:
        return FarfaultError(
            f"the source VMM could not save its device state: {await self._reason(status)}",
            "the source VM runs as before; its VMM's log may say more",
        )

    async def _wait_loaded(self, events: EventListener) -> None:
        try:
            status = await self._next_load_status(events)
        except UnreachableError as error:
            if not self._connection.is_lost:
                raise
            raise _not_loaded("it ended while it loaded, and told why only in its log") from error
        if status != "completed":
            raise _not_loaded(await self._reason(status))

    async def _next_load_status(self, events: EventListener) -> str:
        """The status in which the load ended."""
        while True:
            event = await self._connection.next_event(events, LOAD_TIMEOUT_S, "the end of loading the device state")
            if event.name == "RESUME":
                raise FarfaultError(
                    "the destination VM started on its own, before the hand-over",
                    "end it at once; the source VM must have been stopped before its state was saved",
                )
            if event.status in SETTLED:
                return event.status

    async def _reason(self, status: str) -> str:
        """The VMM's own words about a migration that did not complete, where it has any."""
        with suppress(FarfaultError):
            migration = await self._connection.execute("query-migrate")
            if description := migration.get("error-desc"):
                return str(description)
        return f"the migration ended as {status!r}"

    async def _roll_back(self, commands: asyncio.Task[None], run: bool) -> None:
        """Never raises: it runs while another error is on its way to the caller."""
        await asyncio.wait({commands})  # no longer than its commands may take; none may come after what follows
        try:
            await self.cancel()
            if run and await self.status() != RUNNING:
                await self.cont()
                logger.info("suspend was broken off: the VM runs again")
        except FarfaultError as error:
            logger.error("suspend was broken off, and the VM could not be started again: %s", error)

    async def _continue(self) -> None:
        """Sends ``cont`` until it is taken."""
        for attempt in range(1, CONT_ATTEMPTS_MAX + 1):
            try:
                await self._connection.execute("cont")
                return
            except CommandError:
                if attempt == CONT_ATTEMPTS_MAX or await self.status() != "finish-migrate":
                    raise
                await asyncio.sleep(CONT_PAUSE_S)


def _name_and_version(version: object) -> str:
    """``{"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}`` → ``qemu 7.2.22``."""
    assert isinstance(version, dict)
    name = next(key for key in version if key != "package")
    numbers = version[name]
    return f"{name} {numbers['major']}.{numbers['minor']}.{numbers['micro']}"


def _now_us() -> int:
    return time.time_ns() // 1000


def _not_loaded(reason: str) -> FarfaultError:
    return FarfaultError(
        f"the destination VMM did not load the device state: {reason}",
        "start it anew with -incoming defer and the very options of the source; both need x-ignore-shared and share=on",
    )


class _Early:
    """What a VMM writes until its VM stands still; a context manager that collects it meanwhile.

    Args:
        state: the socket that it writes to, not blocking.

    Attributes:
        is_full: `EARLY_BYTES_MAX` have come.
    """

    def __init__(self, state: socket.socket) -> None:
        self.is_full = asyncio.Event()
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[bytes] = deque()
        self._size_bytes = 0

    def __enter__(self) -> None:
        self._loop.add_reader(self._state, self._take)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._state)

    def _take(self) -> None:
        try:
            chunk = self._state.recv(CHUNK_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:  # the end, or an error: whoever reads next gets it again
            self._loop.remove_reader(self._state)
            return
        self._chunks.append(chunk)
        self._size_bytes += len(chunk)
        if self._size_bytes >= EARLY_BYTES_MAX:
            self.is_full.set()

    async def then_the_rest(self) -> AsyncIterator[bytes]:
        """All that was and will be written."""
        while self._chunks:
            yield self._chunks.popleft()
        while chunk := await _receive(self._state):
            yield chunk


async def _receive(state: socket.socket) -> bytes:
    """What the VMM wrote next; empty when it has closed its end."""
    try:
        async with asyncio.timeout(SAVE_TIMEOUT_S):
            return await asyncio.get_running_loop().sock_recv(state, CHUNK_BYTES_MAX)
    except TimeoutError as error:
        raise FarfaultError(f"the source VMM wrote no device state for {SAVE_TIMEOUT_S:g} s") from error
    except OSError as error:
        raise FarfaultError(f"the source VMM broke off its device state: {error}") from error


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _shut(state: socket.socket) -> None:
    with suppress(OSError):  # closed already
        state.shutdown(socket.SHUT_RDWR)


def _check_size(size_bytes: int) -> None:
    if size_bytes > DEVICE_STATE_BYTES_MAX:
        raise FarfaultError(
            f"the device state has more than {DEVICE_STATE_BYTES_MAX >> 20} MiB: RAM travels in it",
            "start the source VMM with share=on for every memory backend",
        )


async def _feed(state: socket.socket, chunks: AsyncIterator[bytes]) -> None:
    """Writes the chunks and closes the socket. A VMM that stops reading is no error here: it says why elsewhere."""
    loop = asyncio.get_running_loop()
    is_broken = False
    try:
        async for chunk in chunks:
            if not is_broken:
                try:
                    await loop.sock_sendall(state, chunk)
                except OSError:
                    is_broken = True
    finally:
        if isinstance(chunks, AsyncGenerator):  # left early, it must not wait for the garbage collector to know
            await chunks.aclose()
    state.close()
