"""The QMP commands that the reference VMM knows: the subset that `farfault_vmm` documents."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from farfault_cli.errors import FarfaultError

from farfault_shim.kvm.abi import DEVICE
from farfault_shim.refvmm import qmp
from farfault_shim.refvmm.machine import ReferenceVm, RunState
from farfault_shim.refvmm.migration import Migration, MigrationError, opener_of

MEMORY_ID: Final = "ram"
IGNORE_SHARED: Final = "x-ignore-shared"
CAPABILITIES: Final = (IGNORE_SHARED, "events")
DESCRIPTORS_MAX: Final = 16


class CommandNotFoundError(FarfaultError):
    """No such command."""


class QmpCommands:
    """Runs commands on a VM. Each method whose name begins with ``do_`` is one, ``-`` written as ``_``.

    Args:
        vm: to control.
        emit: sends an event, with its data or None.
        may_save: says why the VM cannot move now, or nothing.
        on_quit: the VMM is to end.
    """

    def __init__(
        self,
        vm: ReferenceVm,
        emit: Callable[[str, Mapping[str, Any] | None], None],
        may_save: Callable[[], str],
        on_quit: Callable[[], None],
    ) -> None:
        self._vm = vm
        self._emit = emit
        self._may_save = may_save
        self._on_quit = on_quit
        self._capabilities = dict.fromkeys(CAPABILITIES, False)
        self._descriptors: dict[str, int] = {}
        self._passed: list[int] = []
        self.migration = Migration(vm, self._migration_changed)

    def passed(self, descriptors: list[int]) -> None:
        """Descriptors that came with the bytes of the next ``getfd``; past `DESCRIPTORS_MAX` they are closed."""
        for descriptor in descriptors:
            if len(self._passed) + len(self._descriptors) >= DESCRIPTORS_MAX:
                os.close(descriptor)
            else:
                self._passed.append(descriptor)

    def run(self, request: qmp.Request) -> bytes:
        """Runs a command and gives its reply."""
        if request.error:
            return qmp.failure(request, request.error)
        try:
            command = getattr(self, "do_" + request.command.replace("-", "_"), None)
            if command is None:
                description = f"The command {request.command} has not been found"
                return qmp.failure(request, description, "CommandNotFound")
            return qmp.reply(request, command(**{name.replace("-", "_"): v for name, v in request.arguments.items()}))
        except FarfaultError as error:
            return qmp.failure(request, str(error))
        except (TypeError, KeyError, AttributeError) as error:
            return qmp.failure(request, f"{request.command}: wrong arguments: {error}")

    def close(self) -> None:
        """Ends a migration under way, closes descriptors that nobody used."""
        self.migration.close()
        for descriptor in (*self._passed, *self._descriptors.values()):
            os.close(descriptor)
        self._passed, self._descriptors = [], {}

    # ---- queries -----------------------------------------------------------------------------------

    def do_qmp_capabilities(self, enable: object = None) -> dict[str, Any]:
        return {}

    def do_query_version(self) -> dict[str, Any]:
        return qmp.version()

    def do_query_status(self) -> dict[str, Any]:
        state = self._vm.run_state
        return {"status": state.value, "running": state is RunState.RUNNING}

    def do_query_memdev(self) -> list[dict[str, Any]]:
        return [{"id": MEMORY_ID, "size": self._vm.memory.size_bytes, "share": True}]

    def do_query_cpus_fast(self) -> list[dict[str, Any]]:
        return [{"cpu-index": number} for number in range(self._vm.vcpus)]

    def do_query_kvm(self) -> dict[str, Any]:
        return {"enabled": self._vm.kind == "kvm", "present": Path(DEVICE).exists()}

    def do_qom_get(self, path: str, property: str) -> str:
        if (path, property) != ("/machine", "type"):
            raise CommandNotFoundError(f"there is no property {property} of {path}")
        return f"{self._vm.memory.machine.value}-machine"

    def do_query_migrate(self) -> dict[str, Any]:
        return self.migration.describe()

    def do_query_migrate_capabilities(self) -> list[dict[str, Any]]:
        return [{"capability": name, "state": state} for name, state in self._capabilities.items()]

    # ---- the VM --------------------------------------------------------------------------------------

    def do_stop(self) -> dict[str, Any]:
        self._vm.pause()
        return {}

    def do_cont(self) -> dict[str, Any]:
        self._vm.resume()
        return {}

    def do_quit(self) -> dict[str, Any]:
        self._emit("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        self._on_quit()
        return {}

    # ---- migration -----------------------------------------------------------------------------------

    def do_migrate_set_capabilities(self, capabilities: list[dict[str, Any]]) -> dict[str, Any]:
        for item in capabilities:
            if item["capability"] not in self._capabilities:
                raise MigrationError(f"unknown migration capability {item['capability']!r}")
        for item in capabilities:
            self._capabilities[item["capability"]] = bool(item["state"])
        return {}

    def do_getfd(self, fdname: str) -> dict[str, Any]:
        if not self._passed:
            raise MigrationError("no descriptor came with the command")
        self._close_named(fdname)
        self._descriptors[fdname] = self._passed.pop(0)
        return {}

    def do_closefd(self, fdname: str) -> dict[str, Any]:
        if not self._close_named(fdname):
            raise MigrationError(f"no descriptor named {fdname!r} is open")
        return {}

    def do_migrate(self, uri: str) -> dict[str, Any]:
        self._check_capabilities()
        problem = self._may_save()
        if problem:
            raise MigrationError(problem)
        self.migration.send(opener_of(uri, self._descriptors, incoming=False))
        return {}

    def do_migrate_incoming(self, uri: str) -> dict[str, Any]:
        self._check_capabilities()
        self.migration.receive(opener_of(uri, self._descriptors, incoming=True))
        return {}

    def do_migrate_cancel(self) -> dict[str, Any]:
        self.migration.cancel()
        return {}

    def _check_capabilities(self) -> None:
        if not self._capabilities[IGNORE_SHARED]:
            raise MigrationError(f"this VMM moves device state only: turn the capability {IGNORE_SHARED} on")

    def _close_named(self, name: str) -> bool:
        descriptor = self._descriptors.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def _migration_changed(self, status: str) -> None:
        if self._capabilities["events"]:
            self._emit("MIGRATION", {"status": status})
