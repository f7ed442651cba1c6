"""A second QMP connection to each VMM: when it stopped, resumed, and what became of its migration.

All modes are timed the same way, by the VMM's own time stamps of these events; farfault keeps the first connection.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from farfault_cli.errors import FarfaultError
from farfault_vmm.connection import Event, QmpConnection
from qemu.qmp import EventListener

from farfault_client.demo.vms import GuestVm

CONNECT_TIMEOUT_S: Final = 10.0
EVENTS_MAX: Final = 1000
"""Events passed over while one is awaited."""


@dataclass(frozen=True, slots=True)
class MonitoredVm(GuestVm):
    """A QEMU with a second QMP socket, `monitor`."""

    @property
    def monitor(self) -> Path:
        return self.folder / f"{self.name}.monitor"

    def argv(self, *, incoming: bool = False, attach: Path | None = None, fault_source: str = "") -> list[str]:
        command = GuestVm.argv(self, incoming=incoming, attach=attach, fault_source=fault_source)
        return [*command, "-qmp", f"unix:{self.monitor},server=on,wait=off"]


class Monitor:
    """Connects to `MonitoredVm.monitor`. Use as an async context manager.

    Args:
        path: of the socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = AsyncExitStack()
        self._connection: QmpConnection | None = None
        self._events: EventListener | None = None

    async def __aenter__(self) -> Self:
        connection = await QmpConnection.connect(self._path, CONNECT_TIMEOUT_S)
        self._stack.push_async_callback(connection.close)
        self._connection = connection
        self._events = self._stack.enter_context(connection.events("STOP", "RESUME", "MIGRATION"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def execute(self, command: str, **arguments: object) -> Any:
        """One QMP command; underscores in names of arguments become hyphens."""
        assert self._connection is not None
        return await self._connection.execute(
            command, {name.replace("_", "-"): value for name, value in arguments.items()}
        )

    async def event(self, name: str, status: str = "", *, timeout_s: float) -> Event:
        """The next event of that name (and migration status); earlier ones of other kinds are passed over.

        Raises:
            UnreachableError: it does not come.
            FarfaultError: the migration failed meanwhile.
        """
        assert self._connection is not None
        assert self._events is not None
        for _ in range(EVENTS_MAX):
            event = await self._connection.next_event(self._events, timeout_s, f"{name} {status}".strip())
            if event.name == name and status in ("", event.status):
                return event
            if event.status in ("failed", "cancelled"):
                raise FarfaultError(f"the migration of {self._path.stem} ended as {event.status!r}")
        raise FarfaultError(f"{self._path.stem} tells no {name} {status}")
