"""A Linux guest moves between two QEMUs, and its memory, its disk and its network go on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from farfault.v1 import receiver_pb2 as rpb
from farfault_client.demo.linux import (
    LinuxVm,
    SerialLog,
    ask,
    build_image,
    expected_tick,
    free_tcp_port,
    read_serial,
    wait_for,
)
from farfault_client.demo.linux.image import MIB
from farfault_client.demo.linux.vm import QEMU
from farfault_client.demo.processes import Processes, farfault_argv
from farfault_client.migrate.follow import ReceiverClient, verdict_of
from farfault_client.receive.summary import summary_of
from farfault_vmm.connection import QmpConnection

WAIT_S_MAX = 60.0
POLLS_MAX = 1200
POLL_S = 0.05
PAGE_BYTES = 4096
BALLOON_MIB = 16
SLOW_BYTES_PER_S = 8 * MIB

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get to fetch the guest's kernel"),
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm for the RAM files"),
]


class LinuxScene:
    """A Linux guest at the source, ready to move, and all that a move needs.

    Args:
        folder: on tmpfs, for RAM files, sockets and logs.
        processes: owns every child.
        source, destination: the two ends.
    """

    def __init__(self, folder: Path, processes: Processes, source: LinuxVm, destination: LinuxVm) -> None:
        self.processes = processes
        self.source = source
        self.destination = destination
        self.control = folder / "control"
        self._folder = folder

    async def start(self, *receive_flags: str) -> SerialLog:
        """Boots the guest and starts page server, destination VM and receiver; the guest's disk has been read once."""
        processes, source, destination = self.processes, self.source, self.destination
        source.create_ram()
        destination.create_ram()
        processes.start("source", source.source_argv())
        log = await wait_for(lambda log: log.last_tick >= 50 and log.disk_reads_ok >= 1, source, timeout_s=WAIT_S_MAX)
        port_file, attach = self._folder / "port", self._folder / "attach"
        serve = ["--ram", str(source.ram), "--qmp", str(source.qmp_socket), "--listen", "127.0.0.1:0"]
        processes.farfault("serve", "serve", *serve, "--port-file", str(port_file), *self._state("server"))
        listening = lambda: port_file.exists() and port_file.read_text().strip()  # noqa: E731
        processes.wait_until(listening, "the page server listens", WAIT_S_MAX, "serve")
        run = farfault_argv("run", "--attach", str(attach), "--ram", str(destination.ram), "--fault-source", "blocking")
        processes.start("destination", [*run, "--", *destination.destination_argv()])
        processes.wait_until(destination.qmp_socket.exists, "the destination listens", WAIT_S_MAX, "destination")
        receive = ["--source", f"127.0.0.1:{port_file.read_text().strip()}", "--attach", str(attach)]
        receive += ["--qmp", str(destination.qmp_socket), "--control", str(self.control), *receive_flags]
        processes.farfault("receive", "receive", *receive, *self._state("receiver"))
        processes.wait_until(self.control.exists, "the receiver listens", WAIT_S_MAX, "receive")
        return log

    async def move(self, on_status: Callable[[rpb.MigrationStatus], None] = lambda status: None) -> dict[str, Any]:
        """Moves the guest, waits for the last page, and gives the figures."""
        last = rpb.MigrationStatus()
        async with asyncio.timeout(WAIT_S_MAX), ReceiverClient(self.control) as receiver:
            async for last in receiver.migrate():
                on_status(last)
        verdict_of(last)
        return summary_of(last)

    async def check_guest(self, at_source: SerialLog, uptime_s: float) -> None:
        """Memory, disk and network are right a while after the move, and the source has not run again."""
        frozen = read_serial(self.source)
        log = await wait_for(
            lambda log: log.last_tick >= frozen.last_tick + 300 and log.disk_reads_ok >= at_source.disk_reads_ok + 2,
            *(self.source, self.destination),
            timeout_s=WAIT_S_MAX,
        )
        assert log.problems == []
        assert log.ticks[-1] == expected_tick(
            self.source.image.worker, log.last_tick, worker_mib=self.source.worker_mib
        )
        answer = await ask(self.destination, "are you there?", timeout_s=WAIT_S_MAX)
        assert answer.uptime_s >= uptime_s, "the guest was started again"
        assert read_serial(self.source) == frozen, "the source ran after the hand-over"

    def _state(self, name: str) -> list[str]:
        return ["--state", str(self._folder / name)]


@asynccontextmanager
async def linux_scene(**fields: Any) -> AsyncIterator[LinuxScene]:
    folder = Path(tempfile.mkdtemp(prefix=f"ff-{os.getpid()}-", dir="/dev/shm"))
    try:
        for name in ("s", "d"):
            (folder / name).mkdir()
        source = LinuxVm(build_image(), folder / "s", folder / "s.ram", free_tcp_port(), **fields)
        destination = replace(source, directory=folder / "d", ram=folder / "d.ram", host_port=free_tcp_port())
        with Processes(folder) as processes:
            yield LinuxScene(folder, processes, source, destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def allocated_bytes(ram: Path) -> int:
    return ram.stat().st_blocks * 512


@pytest.mark.parametrize(("machine", "vcpus"), [("q35", 2), ("pc", 1)])
async def test_linux_guest_moves(machine: str, vcpus: int) -> None:
    async with linux_scene(machine=machine, vcpus=vcpus) as scene:
        at_source = await scene.start()
        before = await ask(scene.source, "before", timeout_s=WAIT_S_MAX)
        figures = await scene.move()
        assert figures["demand_faults"] > 0
        assert figures["downtime_ms"] > 0
        await scene.check_guest(at_source, before.uptime_s)
        assert scene.processes.wait("receive", WAIT_S_MAX) == 0


async def test_balloon_inflates_while_pages_are_on_their_way() -> None:
    async with linux_scene(balloon=True, stale_mib=176) as scene:
        at_source = await scene.start("--bandwidth", str(SLOW_BYTES_PER_S))
        before = await ask(scene.source, "before", timeout_s=WAIT_S_MAX)
        running = asyncio.Event()

        def look(status: rpb.MigrationStatus) -> None:
            if status.phase == rpb.PHASE_POSTCOPY:
                running.set()

        move = asyncio.create_task(scene.move(look))
        await asyncio.wait_for(running.wait(), WAIT_S_MAX)
        smaller_bytes = scene.source.ram_bytes - BALLOON_MIB * MIB
        await inflate(scene.destination, smaller_bytes)
        assert not move.done(), "the balloon came too late to meet pages on their way"
        async with ReceiverClient(scene.control) as receiver:
            await receiver.tune(0)
        figures = await move
        await scene.check_guest(at_source, before.uptime_s)
        assert figures["removed_pages"] >= BALLOON_MIB * MIB // PAGE_BYTES
        # The source still holds old data in pages that the balloon took: none of them has come back.
        assert allocated_bytes(scene.source.ram) > smaller_bytes
        assert allocated_bytes(scene.destination.ram) <= smaller_bytes


async def inflate(end: LinuxVm, guest_bytes: int) -> None:
    """Shrinks the guest to a size, by its balloon; returns when it is done."""
    qmp = await QmpConnection.connect(end.operator_socket, timeout_s=WAIT_S_MAX)
    try:
        await qmp.execute("balloon", {"value": guest_bytes})
        for _ in range(POLLS_MAX):
            if (await qmp.execute("query-balloon"))["actual"] == guest_bytes:
                return
            await asyncio.sleep(POLL_S)
        raise AssertionError("the balloon was never inflated")
    finally:
        await qmp.close()
