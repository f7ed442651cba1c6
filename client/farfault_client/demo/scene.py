"""A whole move on one machine, part by part: source VM, page server, destination VM, receiver.

`farfault demo`, the end-to-end tests and the benchmarks play the same scene.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError
from farfault_shim.guest import GuestKind, Mailbox, RamCheck, total_touched, verify_ram
from farfault_vmm.qmp import QmpVmm

from farfault_client.demo.processes import Processes, farfault_argv
from farfault_client.demo.vms import GuestVm, VmmKind
from farfault_client.migrate.follow import ReceiverClient, verdict_of

START_TIMEOUT_S = 60.0
MOVE_TIMEOUT_S = 300.0


def scene_folder(prefix: str) -> Path:
    """A new folder for a scene, in memory where there is such a place: records are synced within the downtime."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=prefix, dir=memory if memory.is_dir() else None))


PORTS = 4
"""Ports of a page server: gRPC, express, background, express background."""


def port_flags(ports: Sequence[int]) -> tuple[str, ...]:
    """Flags of `farfault serve` that fix the ports of its lanes.

    Args:
        ports: `PORTS` of them; the first is the server's own, which `--listen` names.
    """
    names = ("--express-port", "--background-port", "--express-background-port")
    return tuple(word for name, port in zip(names, ports[1:], strict=True) for word in (name, str(port)))


@dataclass(frozen=True, slots=True)
class SceneConfig:
    """What is played.

    Attributes:
        kind: of both VMMs.
        ram_bytes, vcpus, pages_max: of the guest.
        guest: what it does with its memory.
        fault_source: ``stock-nowait`` or ``blocking``; the simulated KVM has its own.
        serve_flags, receive_flags: added to those commands.
        source_target: where the receiver finds the page server; None: where it listens.
        source_prefix, destination_prefix: put before every command of that side, such as ``ip netns exec``.
        listen: address of the page server, without port.
    """

    kind: VmmKind
    ram_bytes: int = 512 << 20
    vcpus: int = 2
    guest: GuestKind = GuestKind.RANDOM
    pages_max: int | None = None
    fault_source: str = "stock-nowait"
    serve_flags: Sequence[str] = ()
    receive_flags: Sequence[str] = ()
    source_target: str | None = None
    source_prefix: Sequence[str] = ()
    destination_prefix: Sequence[str] = ()
    listen: str = "127.0.0.1"


@dataclass
class Scene:
    """The parts, in the order in which they are started.

    Args:
        config: what is played.
        folder: for sockets, logs, records; removed by its owner.
        processes: owns every child.
        ram_folder: on tmpfs or hugetlbfs.
    """

    config: SceneConfig
    folder: Path
    processes: Processes
    ram_folder: Path = Path("/dev/shm")
    source: GuestVm = field(init=False)
    destination: GuestVm = field(init=False)
    port: int = 0

    def __post_init__(self) -> None:
        tag = f"farfault-{os.getpid()}-{self.folder.name}"
        self.source, self.destination = (
            GuestVm(
                self.config.kind,
                name,
                self.folder,
                self.ram_folder / f"{tag}-{name}.ram",
                self.config.ram_bytes,
                self.config.vcpus,
                self.config.guest,
                pages_max=self.config.pages_max,
            )
            for name in ("source", "destination")
        )

    @property
    def attach(self) -> Path:
        return self.folder / "attach"

    @property
    def control(self) -> Path:
        return self.folder / "control"

    def remove_ram(self) -> None:
        """Frees the RAM files."""
        for vm in (self.source, self.destination):
            vm.ram.unlink(missing_ok=True)

    def start_source(self, passes: int = 1) -> None:
        """Starts the source VM and waits until its guest has filled its pages, and gone round so often."""
        self.processes.start("source", [*self.config.source_prefix, *self.source.argv()])
        ready = lambda: self.source.has_passes(passes)  # noqa: E731 - named for the message below
        self.processes.wait_until(ready, "the guest's first round", START_TIMEOUT_S, "source")

    def start_server(self, *, port: int = 0) -> None:
        """Starts the page server and learns its port."""
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        command = farfault_argv("serve", "--ram", str(self.source.ram), "--qmp", str(self.source.qmp))
        command += ["--listen", f"{self.config.listen}:{port or self.port}", "--port-file", str(port_file)]
        command += ["--state", str(self.folder / "server"), *self.config.serve_flags]
        self.processes.start("serve", [*self.config.source_prefix, *command])
        listening = lambda: port_file.exists() and port_file.read_text().strip()  # noqa: E731
        self.processes.wait_until(listening, "the page server listens", START_TIMEOUT_S, "serve")
        self.port = int(port_file.read_text())

    def start_destination(self) -> None:
        """Starts the destination VM; it attaches as soon as there is a receiver."""
        argv = self.destination.argv(incoming=True, attach=self.attach, fault_source=self.config.fault_source)
        self.processes.start("destination", [*self.config.destination_prefix, *argv])
        qmp = self.destination.qmp
        self.processes.wait_until(qmp.exists, "the destination VMM listens", START_TIMEOUT_S, "destination")

    def start_receiver(self) -> None:
        """Starts the receiver, which waits to be told."""
        target = self.config.source_target or f"{self.config.listen}:{self.port}"
        command = farfault_argv("receive", "--source", target, "--attach", str(self.attach))
        command += ["--qmp", str(self.destination.qmp), "--control", str(self.control)]
        command += ["--state", str(self.folder / "receiver"), "--json", *self.config.receive_flags]
        self.processes.start("receive", [*self.config.destination_prefix, *command])
        self.processes.wait_until(self.control.exists, "the receiver listens", START_TIMEOUT_S, "receive")

    def start_all(self) -> None:
        """All four, up to the point where the VM can move."""
        self.start_source()
        self.start_server()
        self.start_destination()
        self.start_receiver()

    def move(self, show: Callable[[rpb.MigrationStatus], None] = lambda status: None) -> rpb.MigrationStatus:
        """Moves the VM and waits for the last page.

        Raises:
            FarfaultError: the move failed, with the receiver's reason.
        """
        return asyncio.run(self._move(show))

    async def _move(self, show: Callable[[rpb.MigrationStatus], None]) -> rpb.MigrationStatus:
        last = rpb.MigrationStatus()
        try:
            async with asyncio.timeout(MOVE_TIMEOUT_S), ReceiverClient(self.control) as receiver:
                async for last in receiver.migrate():
                    show(last)
        except TimeoutError:
            raise FarfaultError(f"the move takes longer than {MOVE_TIMEOUT_S:g} s:\n{self.logs()}") from None
        verdict_of(last)
        return last

    def counter(self, vm: GuestVm) -> int:
        """Pages that the guest has verified."""
        return total_touched(vm.mailboxes())

    def wait_for_progress(self, beyond: int, passes: int = 1) -> None:
        """Waits until the guest has visited as many pages on the destination as it uses."""
        parameters = self.destination.parameters
        goal = beyond + passes * parameters.visits_per_pass * parameters.vcpus
        moved_on = lambda: self.counter(self.destination) >= goal  # noqa: E731
        self.processes.wait_until(moved_on, "the guest goes on", START_TIMEOUT_S, "destination")

    def check_guest(self, vm: GuestVm) -> tuple[list[Mailbox], RamCheck]:
        """Stops a VM and checks all of its RAM from outside."""
        asyncio.run(_stop(vm.qmp))
        mailboxes = vm.mailboxes()
        descriptor = os.open(vm.ram, os.O_RDONLY)
        try:
            return mailboxes, verify_ram(descriptor, vm.parameters, mailboxes)
        finally:
            os.close(descriptor)

    def summary_of_receiver(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Waits for the receiver's end and reads the figures that it printed."""
        code = self.processes.wait("receive", timeout_s)
        if code:
            raise FarfaultError(f"the receiver ended with exit code {code}:\n{self.processes.tail('receive')}")
        last_line = self.processes.log("receive").read_text().strip().splitlines()[-1]
        figures: dict[str, Any] = json.loads(last_line)
        return figures

    def logs(self) -> str:
        """The last words of everybody."""
        names = ("source", "serve", "destination", "receive")
        return "\n".join(f"--- {name}\n{self.processes.tail(name)}" for name in names)


async def _stop(qmp: Path) -> None:
    async with await QmpVmm.connect(qmp) as vmm:
        await vmm.stop()


def qmp_status(qmp: Path) -> str:
    """A VMM's run state."""

    async def ask() -> str:
        async with await QmpVmm.connect(qmp) as vmm:
            return await vmm.status()

    return asyncio.run(ask())
