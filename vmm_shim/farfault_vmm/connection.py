"""One QMP connection: commands, events, descriptors and its loss, each wait with a bound.

A thin layer over ``qemu.qmp`` that turns whatever goes wrong into a `FarfaultError` with a remedy.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from farfault_cli.errors import FarfaultError, UnreachableError
from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

COMMAND_TIMEOUT_S = 10.0
"""For the reply to one command. QEMU's main thread may be waiting for a page that is still on the way."""
CLOSE_TIMEOUT_S = 2.0

# Whatever qemu.qmp logs as an error it also raises, and here that becomes one FarfaultError.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class CommandError(FarfaultError):
    """The VMM answered a command with an error.

    Args:
        command: its name.
        description: the VMM's words.
    """

    def __init__(self, command: str, description: str, remedy: str = "") -> None:
        super().__init__(f"the VMM refused {command!r}: {description}", remedy)
        self.command = command
        self.description = description


@dataclass(frozen=True, slots=True)
class Event:
    """One QMP event.

    Attributes:
        name: ``STOP``, ``RESUME``, ``MIGRATION`` ...
        status: ``data.status`` of a MIGRATION event, else empty.
        unix_us: when it happened, by the VMM's clock.
    """

    name: str
    status: str
    unix_us: int

    @classmethod
    def of_message(cls, message: Message) -> Event:
        """From what the VMM sent; what is missing is empty or 0."""
        data, timestamp = message.get("data"), message.get("timestamp")
        status = data.get("status") if isinstance(data, Mapping) else None
        unix_us = 0
        if isinstance(timestamp, Mapping):
            unix_us = int(timestamp.get("seconds", 0)) * 1_000_000 + int(timestamp.get("microseconds", 0))
        return cls(str(message["event"]), str(status or ""), unix_us)


class QmpConnection:
    """A connection that has been greeted. Make it with `connect`; `close` it."""

    def __init__(self, client: QMPClient, descriptors: socket.socket, path: Path) -> None:
        self.path = path
        self._client = client
        self._descriptors = descriptors
        self._lost = asyncio.Event()
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {path}")

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], timeout_s: float) -> QmpConnection:
        """Connects and negotiates.

        Raises:
            UnreachableError: no socket, nobody listens, no permission, another client is being served, or what
                answers does not speak QMP.
        """
        path = Path(path)
        client = QMPClient(str(path))
        with ExitStack() as on_failure:
            connected = on_failure.enter_context(_open_socket(path))
            descriptors = on_failure.enter_context(connected.dup())
            try:
                async with asyncio.timeout(timeout_s):
                    await client.connect(connected)
            except TimeoutError as error:
                raise _busy(path, timeout_s) from error
            except (ConnectError, OSError) as error:
                raise UnreachableError(
                    f"what answers at {path} does not speak QMP: {error}",
                    "give the socket of QEMU's option -qmp unix:PATH,server=on,wait=off",
                ) from error
            on_failure.pop_all()  # the client owns the one from here on, the connection the other
        return cls(client, descriptors, path)

    @property
    def version(self) -> Mapping[str, Any]:
        """``QMP.version`` of the greeting."""
        greeting = self._client.greeting
        assert greeting is not None, "connect() negotiates"
        return cast(Mapping[str, Any], greeting.QMP.version)

    @property
    def is_qemu(self) -> bool:
        """Whether the VMM says that it is QEMU."""
        return "qemu" in self.version

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Runs one command and returns its value.

        Raises:
            CommandError: the VMM answers with an error.
            UnreachableError: no answer within `COMMAND_TIMEOUT_S`, or the connection is lost.
        """
        if self._client.runstate is not Runstate.RUNNING:
            raise self.lost_error()
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise CommandError(command, error.error.error.desc) from error
        except TimeoutError as error:
            raise UnreachableError(
                f"the VMM at {self.path} did not answer {command!r} in {COMMAND_TIMEOUT_S:g} s",
                "its main thread is stuck, perhaps on a page that does not arrive: look at the receiver and its log",
            ) from error
        except (ExecInterruptedError, StateError) as error:
            raise self.lost_error() from error
        except QMPError as error:
            raise UnreachableError(f"the VMM at {self.path} broke the QMP protocol: {error}") from error

    async def pass_descriptor(self, fd: int, name: str) -> None:
        """Gives the VMM a duplicate of a descriptor under a name, for a ``fd:NAME`` address.

        Raises:
            CommandError, UnreachableError: as `execute`.
        """
        # Right after a command was answered nothing else is being written, so the blank cannot split one.
        try:
            socket.send_fds(self._descriptors, [b" "], [fd])
        except OSError as error:
            raise self.lost_error() from error
        await self.execute("getfd", {"fdname": name})

    def events(self, *names: str) -> AbstractContextManager[EventListener]:
        """A context in which the named events are kept for `next_event`."""
        return self._client.listener(names)

    async def next_event(self, listener: EventListener, timeout_s: float, what: str) -> Event:
        """The next event, in the order in which they came; also those that came before a loss.

        Args:
            what: the thing waited for, for the error.

        Raises:
            UnreachableError: none came in time, or the connection is lost.
        """
        event, lost = asyncio.ensure_future(listener.get()), asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({event, lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return Event.of_message(event.result())
        finally:
            event.cancel()
            lost.cancel()
        if self.is_lost:
            raise self.lost_error()
        raise UnreachableError(f"the VMM at {self.path}: {what} did not happen in {timeout_s:g} s")

    @property
    def is_lost(self) -> bool:
        """Whether the connection is gone."""
        return self._lost.is_set()

    async def wait_lost(self) -> None:
        """Returns when the connection is gone, from whichever side."""
        await self._lost.wait()

    def lost_error(self) -> UnreachableError:
        """The error for whoever still wants something of a connection that is gone."""
        return UnreachableError(
            f"the VMM at {self.path} closed its QMP connection", "look at the VMM's log: it has ended or was killed"
        )

    async def close(self) -> None:
        """Ends the connection; the VM stays as it is. Idempotent."""
        self._watcher.cancel()
        self._descriptors.close()
        self._lost.set()
        # Raises again what ended the connection, which its users have been told.
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._client.disconnect()

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        self._lost.set()


def _open_socket(path: Path) -> socket.socket:
    """A connected, non-blocking socket. Connecting to a unix socket never takes time: it succeeds or fails at once."""
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise _unreachable(path, error) from error
    return connection


def _unreachable(path: Path, error: OSError) -> UnreachableError:
    if isinstance(error, FileNotFoundError):
        return UnreachableError(
            f"there is no QMP socket {path}", f"start the VMM with -qmp unix:{path},server=on,wait=off, or fix the path"
        )
    if isinstance(error, ConnectionRefusedError):
        return UnreachableError(
            f"nobody listens at the QMP socket {path}", "the VMM that made it has ended: start it again"
        )
    if isinstance(error, BlockingIOError):
        return _busy(path, 0)
    if isinstance(error, PermissionError):
        return UnreachableError(
            f"no permission to connect to the QMP socket {path}", "run as the VMM's user or as root"
        )
    return UnreachableError(f"cannot connect to the QMP socket {path}: {error.strerror or error}")


def _busy(path: Path, timeout_s: float) -> UnreachableError:
    waited = f" in {timeout_s:g} s" if timeout_s else ""
    return UnreachableError(
        f"the VMM at {path} does not answer{waited}, probably because it serves another client: QEMU serves one QMP "
        "client at a time",
        "close the other client (a shell, libvirt, a second farfault), or give the VMM a second -qmp socket",
    )
