"""A move whose network can break and whose parts can be killed and started again, step by step."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError
from farfault_client.demo.processes import Processes, farfault_argv
from farfault_client.demo.scene import PORTS, Scene, SceneConfig, port_flags, qmp_status
from farfault_client.migrate.follow import ReceiverClient
from farfault_vmm.qmp import QmpVmm
from netsim_helpers import PROXY_ADDRESS, Proxy, free_ports

WAIT_S = 60.0
SWITCHOVER_RTT_MS = 400
"""A network so slow that each step of a switchover can be met."""
SLOW_BYTES_PER_S = 3 << 20
"""A background so slow that the middle of a post-copy can be met."""
STILL_POLLS = 30
STANDS_STILL_S = 15.0


class FaultyMove:
    """Use as a context manager; it ends every process and removes every file.

    Args:
        config: what is played; its ports and its target are set here.
        folder: for sockets, logs and records.
        rtt_ms: of the network between the hosts.
        seed: of the places that the network damages.
    """

    def __init__(self, config: SceneConfig, folder: Path, *, rtt_ms: float = 0, seed: int = 0) -> None:
        self.ports = free_ports(PORTS)
        sides = port_flags(self.ports)
        config = replace(
            config,
            serve_flags=(*config.serve_flags, *sides),
            source_target=f"{PROXY_ADDRESS}:{self.ports[0]}",
        )
        self.processes = Processes(folder)
        self.scene = Scene(config, folder, self.processes)
        self.scene.port = self.ports[0]
        self.proxy = Proxy(self.ports, rtt_ms=rtt_ms, seed=seed)

    def __enter__(self) -> Self:
        self.proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.processes.names():
            self.signal(name, signal.SIGCONT)
        self.processes.__exit__(None, None, None)
        self.proxy.__exit__(None, None, None)
        self.scene.remove_ram()

    # ---- acts ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Everything up to the point where the VM can move."""
        self.scene.start_all()

    def begin(self) -> None:
        """Starts `farfault migrate`; returns at once."""
        self.processes.farfault("migrate", "migrate", "--control", str(self.scene.control), "--json")

    def migrate(self, *flags: str, timeout_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
        """Runs `farfault migrate` to its end."""
        argv = farfault_argv("migrate", "--control", str(self.scene.control), *flags)
        return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s)

    def take_up(self) -> subprocess.CompletedProcess[str]:
        """Runs `farfault migrate --resume` with a receiver of its own, to its end."""
        scene = self.scene
        flags = ["--source", str(scene.config.source_target), "--attach", str(scene.attach), "--json"]
        flags += ["--qmp", str(scene.destination.qmp), "--state", str(scene.folder / "receiver"), "--resume"]
        return subprocess.run(farfault_argv("migrate", *flags), capture_output=True, text=True, timeout=WAIT_S)

    def kill(self, name: str) -> None:
        """SIGKILL. Control sockets that it leaves are taken away, as a starting receiver would find them."""
        self.processes.kill(name)
        if name == "receive":
            self.scene.control.unlink(missing_ok=True)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to a part, if it lives."""
        if self.is_alive(name):
            os.kill(self.processes.pid(name), number)

    def restart(self, name: str) -> None:
        """Starts serve or receive again, with its state."""
        if name == "serve":
            self.scene.start_server()
        else:
            self.scene.start_receiver()

    def tune(self, bytes_per_s: int) -> None:
        """Changes the cap of the background lane; 0: none."""

        async def ask() -> None:
            async with ReceiverClient(self.scene.control) as receiver:
                await receiver.tune(bytes_per_s)

        asyncio.run(ask())

    # ---- what is -------------------------------------------------------------------------------------

    def status(self) -> rpb.MigrationStatus:
        """The receiver's status now."""

        async def ask() -> rpb.MigrationStatus:
            async with ReceiverClient(self.scene.control) as receiver:
                async for status in receiver.watch():
                    return status
            raise FarfaultError("no status")

        return asyncio.run(ask())

    def receiver_step(self) -> str:
        """How far the receiver's journal has come; empty: no record."""
        return str(read_json(self.scene.folder / "receiver" / "receiver.json").get("step", ""))

    def server_phase(self) -> str:
        """The server's record of the VM."""
        return str(read_json(self.scene.folder / "server" / "leases.json").get("phase", ""))

    def settled_pages(self) -> int:
        """Pages that the receiver has settled."""
        return int(self.status().counters["settled_pages"])

    # ---- waits ---------------------------------------------------------------------------------------

    def wait_step(self, step: str) -> None:
        """Until the receiver's journal says so."""
        self.processes.wait_until(lambda: self.receiver_step() == step, f"the receiver is {step}", WAIT_S)

    def wait_server(self, phase: str) -> None:
        """Until the server's record says so."""
        self.processes.wait_until(lambda: self.server_phase() == phase, f"the VM is {phase}", WAIT_S)

    def wait_attached(self, times: int = 1) -> None:
        """Until a VMM has attached so often to this receiver."""
        log = self.processes.log("receive")
        attached = lambda: log.read_text().count(" attached, fault source") >= times  # noqa: E731
        self.processes.wait_until(attached, "the VMM attaches", WAIT_S, "receive")

    def wait_postcopy(self) -> None:
        """Until the destination runs."""
        self.wait_step("running")
        runs = (rpb.PHASE_POSTCOPY, rpb.PHASE_DONE)
        self.processes.wait_until(lambda: self.status().phase in runs, "the destination runs", WAIT_S, "receive")

    def wait_settled(self, pages: int) -> None:
        """Until so many pages have been settled, or the move is over."""
        reached = lambda: self.receiver_step() != "running" or self.settled_pages() >= pages  # noqa: E731
        self.processes.wait_until(reached, f"{pages} pages settled", WAIT_S)

    def wait_still(self) -> None:
        """Until the destination's guest stands still: it waits for pages that nobody brings."""
        seen: list[int] = []

        def is_still() -> bool:
            seen.append(self.scene.counter(self.scene.destination))
            return len(seen) > STILL_POLLS and len(set(seen[-STILL_POLLS:])) == 1

        self.processes.wait_until(is_still, "the guest waits", WAIT_S)

    # ---- verdicts ------------------------------------------------------------------------------------

    def assert_moved(self) -> dict[str, Any]:
        """The move ends well: the guest runs here, only here, and every page is right. Gives the last summary."""
        scene = self.scene
        stopped_at = scene.counter(scene.source)
        scene.wait_for_progress(stopped_at)
        figures: dict[str, Any] = scene.summary_of_receiver(WAIT_S)
        assert figures["phase"] == "done", figures
        assert figures["counters"]["existed_pages"] == 0, "a page was installed twice"
        self.assert_right(scene.destination)
        assert scene.counter(scene.source) == stopped_at, "the source ran after the hand-over"
        if "serve" in self.processes.names():
            self.wait_server("completed")
            self.processes.end("serve")
        assert qmp_status(scene.source.qmp) != "running"
        return figures

    def assert_source_runs(self) -> None:
        """The guest runs on the source, only there, and every page is right."""
        scene = self.scene
        before = scene.counter(scene.source)
        self.processes.wait_until(lambda: scene.counter(scene.source) > before, "the source runs", WAIT_S, "source")
        self.assert_stands_still("destination")
        if "serve" in self.processes.names():
            self.processes.end("serve")
        self.assert_right(scene.source)

    def assert_stands_still(self, name: str) -> None:
        """A VMM has ended, is about to, or does not run its VM."""
        qmp = getattr(self.scene, name).qmp

        def stands_still() -> bool:
            try:
                return not self.is_alive(name) or qmp_status(qmp) != "running"
            except FarfaultError:
                return False  # it ends just now

        self.processes.wait_until(stands_still, f"the {name} VM stands still", STANDS_STILL_S)

    def assert_right(self, vm: Any) -> None:
        """Stops a VM; its guest and all of its RAM are right."""
        mailboxes, check = self.scene.check_guest(vm)
        assert check.ok, check.problems
        assert sum(mailbox.errors for mailbox in mailboxes) == 0
        assert [mailbox.boots for mailbox in mailboxes] == [1] * len(mailboxes), "the guest was reset"

    def is_alive(self, name: str) -> bool:
        """Was it started, and has it not ended?"""
        return name in self.processes.names() and self.processes.is_running(name)


def continue_vm(qmp: Path, *, for_a_moment: bool = False) -> None:
    """Lets a VM run behind our back, and perhaps stops it at once."""

    async def run() -> None:
        async with await QmpVmm.connect(qmp) as vmm:
            await vmm.cont()
            if for_a_moment:
                await vmm.stop()

    asyncio.run(run())


def read_json(path: Path) -> dict[str, Any]:
    """A record as it is now; empty where there is none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return fields
