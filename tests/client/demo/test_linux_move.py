"""The guest on real QEMUs: it boots, works, answers, and its command lines fit a move.

The moves here copy the RAM file by hand: they prove the guest and the command lines, not the pager.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from farfault_cli.errors import UnreachableError
from farfault_client.demo.linux import (
    GuestImage,
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
from farfault_vmm.connection import QmpConnection

WAIT_S_MAX = 90.0
POLLS_MAX = 600
POLL_S = 0.05
PAGE_BYTES = 4096
GOLDEN = 0x9E3779B97F4A7C15  # of worker.c: the step from word to word

pytestmark = [
    pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed"),
    pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get to fetch the guest's kernel"),
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm for the RAM file"),
]


@pytest.fixture(scope="module")
def image() -> GuestImage:
    return build_image()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on tmpfs, for RAM files, sockets and logs."""
    with TemporaryDirectory(prefix=f"ff-{os.getpid()}-", dir="/dev/shm") as directory:
        yield Path(directory)


def end_of(image: GuestImage, place: Path, name: str, **fields: Any) -> LinuxVm:
    directory = place / name
    directory.mkdir()
    return LinuxVm(image, directory, place / f"{name}.ram", free_tcp_port(), **fields)


class Running:
    """A QEMU process and its QMP connection."""

    def __init__(self, process: subprocess.Popen[bytes], qmp: QmpConnection) -> None:
        self._process = process
        self.execute = qmp.execute

    def alive(self) -> bool:
        return self._process.poll() is None

    async def poll(self, command: str, field: str, wanted: object) -> None:
        """Repeats a query until a field of its result has the wanted value."""
        seen: object = None
        for _ in range(POLLS_MAX):
            seen = (await self.execute(command)).get(field)
            assert seen != "failed", f"{command}: failed"
            if seen == wanted:
                return
            await asyncio.sleep(POLL_S)
        raise AssertionError(f"{command}: {field} is {seen!r} and never {wanted!r}")


async def connected(end: LinuxVm, process: subprocess.Popen[bytes]) -> QmpConnection:
    for _ in range(POLLS_MAX):
        assert process.poll() is None, (end.directory / "stderr").read_text()
        with suppress(UnreachableError):
            return await QmpConnection.connect(end.qmp_socket, timeout_s=WAIT_S_MAX)
        await asyncio.sleep(POLL_S)
    raise AssertionError("QEMU never listened for QMP")


@asynccontextmanager
async def qemu(argv: list[str], end: LinuxVm) -> AsyncIterator[Running]:
    with (
        (end.directory / "stderr").open("wb") as sink,
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=sink) as process,
    ):
        try:
            qmp = await connected(end, process)
            try:
                yield Running(process, qmp)
            finally:
                await qmp.close()
        finally:
            process.kill()


async def copy_and_move(source: LinuxVm, running: Running, destination: LinuxVm, moved: Running) -> None:
    """Moves the device state of a stopped source; the destination's RAM file must be there by now."""
    capabilities = [{"capability": "x-ignore-shared", "state": True}]
    uri = f"unix:{destination.directory}/migration.sock"
    for end in (running, moved):
        await end.execute("migrate-set-capabilities", {"capabilities": capabilities})
    await moved.execute("migrate-incoming", {"uri": uri})
    await running.execute("migrate", {"uri": uri})
    await running.poll("query-migrate", "status", "completed")
    await moved.poll("query-status", "status", "paused")  # the source was stopped, and that travels
    await moved.execute("cont")


def check(log: SerialLog, image: GuestImage, worker_mib: int) -> None:
    assert log.problems == []
    assert log.ticks[-1] == expected_tick(image.worker, log.last_tick, worker_mib=worker_mib)


@pytest.mark.parametrize(("machine", "vcpus", "balloon"), [("pc", 1, True), ("q35", 2, False)])
async def test_guest_works(image: GuestImage, place: Path, machine: str, vcpus: int, balloon: bool) -> None:
    end = end_of(image, place, "vm", machine=machine, vcpus=vcpus, balloon=balloon, worker_mib=64, pause_ms=2)
    end.create_ram()
    async with qemu(end.source_argv(), end) as running:
        await wait_for(lambda log: log.last_tick >= 50, end, timeout_s=WAIT_S_MAX, alive=running.alive)
        first = await ask(end, "first question", timeout_s=WAIT_S_MAX)
        second = await ask(end, "second question", timeout_s=WAIT_S_MAX)
        assert (first.text, second.text) == ("first question", "second question")
        assert 0 < first.uptime_s <= second.uptime_s
        if balloon:
            target_bytes = end.ram_bytes - 16 * MIB
            await running.execute("balloon", {"value": target_bytes})
            await running.poll("query-balloon", "actual", target_bytes)
        log = await wait_for(lambda log: log.disk_reads_ok >= 2, end, timeout_s=WAIT_S_MAX, alive=running.alive)
        check(log, image, worker_mib=64)


async def test_move_keeps_memory_disk_and_network(image: GuestImage, place: Path) -> None:
    source = end_of(image, place, "source", balloon=True)
    destination = end_of(image, place, "destination", balloon=True)
    source.create_ram()
    async with qemu(source.source_argv(), source) as running:
        await wait_for(lambda log: log.disk_reads_ok >= 1, source, timeout_s=WAIT_S_MAX, alive=running.alive)
        before = await ask(source, "before", timeout_s=WAIT_S_MAX)
        await running.execute("stop")
        shutil.copyfile(source.ram, destination.ram)
        async with qemu(destination.destination_argv(), destination) as moved:
            await copy_and_move(source, running, destination, moved)
            at_source = read_serial(source)
            log = await wait_for(
                lambda log: log.last_tick > at_source.last_tick + 100 and log.disk_reads_ok > at_source.disk_reads_ok,
                *(source, destination),
                timeout_s=WAIT_S_MAX,
                alive=moved.alive,
            )
            after = await ask(destination, "after", timeout_s=WAIT_S_MAX)
            assert after.uptime_s >= before.uptime_s
            assert read_serial(source) == at_source
            check(log, image, source.worker_mib)


async def test_guest_sees_a_page_that_the_move_changed(image: GuestImage, place: Path) -> None:
    """The detector detects: without this, a good verdict would mean nothing."""
    source = end_of(image, place, "source", worker_mib=64)
    destination = end_of(image, place, "destination", worker_mib=64)
    source.create_ram()
    async with qemu(source.source_argv(), source) as running:
        await wait_for(lambda log: log.last_tick >= 20, source, timeout_s=WAIT_S_MAX, alive=running.alive)
        await running.execute("stop")
        shutil.copyfile(source.ram, destination.ram)
        assert change_worker_pages(destination.ram) > 100
        async with qemu(destination.destination_argv(), destination) as moved:
            await copy_and_move(source, running, destination, moved)
            log = await wait_for(
                lambda log: bool(log.ticks[-1].bad), source, destination, timeout_s=WAIT_S_MAX, alive=moved.alive
            )
    assert "words of memory were found wrong" in log.problems[-1]
    assert log.ticks[-1].hash != expected_tick(image.worker, log.last_tick, worker_mib=64).hash


def change_worker_pages(ram: Path) -> int:
    """Sets the last word of every 64th of the worker's pages to 0; returns the number of pages changed."""
    found = changed = 0
    with ram.open("r+b") as file:
        for offset in range(0, ram.stat().st_size, PAGE_BYTES):
            file.seek(offset)
            words = struct.unpack("<3Q", file.read(24))
            if (words[1] - words[0]) % 2**64 == (words[2] - words[1]) % 2**64 == GOLDEN:
                found += 1
                if found % 64 == 0:
                    file.seek(offset + PAGE_BYTES - 8)
                    file.write(bytes(8))
                    changed += 1
    return changed


async def test_wait_says_what_the_console_said_last(image: GuestImage, place: Path) -> None:
    end = end_of(image, place, "vm")
    end.serial_log.write_bytes(b"T 1 00000000000000ff bad=0\r\nKernel panic - not syncing: gone\r\n")
    with pytest.raises(Exception, match="gone after tick 1") as error:
        await wait_for(lambda log: log.last_tick >= 2, end, timeout_s=WAIT_S_MAX)
    assert "not syncing: gone" in str(error.value)
    with pytest.raises(Exception, match=r"at tick 1 after 0\.01 s"):
        end.serial_log.write_bytes(b"T 1 00000000000000ff bad=0\r\n")
        await wait_for(lambda log: log.last_tick >= 2, end, timeout_s=0.01)


async def test_nobody_answers(image: GuestImage, place: Path) -> None:
    end = end_of(image, place, "vm")
    with pytest.raises(Exception, match=r"has not answered in 0\.2 s"):
        await ask(end, "anyone?", timeout_s=0.2)
