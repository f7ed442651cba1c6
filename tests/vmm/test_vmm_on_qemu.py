"""Real QEMUs under KVM and TCG with the guest that verifies its own pages.

The destination gets its RAM content by a plain copy of the file when the first byte of device state arrives: the
memory is frozen from there on. A guest that finds an error, or boots a second time, shows a state that is not whole.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import uvloop
from farfault_cli.errors import FarfaultError, PreflightError, UnreachableError
from farfault_shim.guest.addresses import PAGE_BYTES, clock_address
from farfault_shim.guest.program import image_path
from farfault_vmm.connection import CommandError, QmpConnection
from farfault_vmm.description import MemoryBackend, compare
from farfault_vmm.qmp import QmpVmm
from qemu.qmp import QMPClient
from qemu_hosts import MIB, QEMU, RAM_MIB, WAIT_S_MAX, Host, host

STATE_BYTES_MAX = 2 * MIB
"""The device state of these machines has some 140 KB; with their RAM it would have at least PAGES pages."""

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(not image_path().exists(), reason="the guest image is not built: make native"),
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm for the RAM file"),
]
needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened")
accelerators = pytest.mark.parametrize("accelerator", [pytest.param("kvm", marks=needs_kvm), "tcg"])


@pytest.fixture
def directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix=f"ff-{os.getpid()}-vmm-", dir="/dev/shm") as path:
        yield Path(path)


@contextmanager
def pair(directory: Path, accelerator: str, *, machine: str = "pc", vcpus: int = 1) -> Iterator[tuple[Host, Host]]:
    with ExitStack() as stack:
        source = stack.enter_context(host(directory, "source", accelerator, machine=machine, vcpus=vcpus))
        options = ("-incoming", "defer")
        yield (
            source,
            stack.enter_context(host(directory, "destination", accelerator, *options, machine=machine, vcpus=vcpus)),
        )


async def state_with_ram(vmm: QmpVmm, source: Host, destination: Host) -> AsyncIterator[bytes]:
    """The device state; the RAM content is brought over at its first chunk."""
    size_bytes = 0
    async for chunk in vmm.suspend():
        if not size_bytes:
            destination.ram.open("r+b").write(source.ram.read_bytes())
        size_bytes += len(chunk)
        yield chunk
    assert 0 < size_bytes < STATE_BYTES_MAX


def pages_that_differ(one: Path, other: Path) -> set[int]:
    ours, theirs = one.read_bytes(), other.read_bytes()
    starts = range(0, RAM_MIB * MIB, PAGE_BYTES)
    return {
        start // PAGE_BYTES
        for start in starts
        if ours[start : start + PAGE_BYTES] != theirs[start : start + PAGE_BYTES]
    }


def clock_pages(vcpus: int) -> set[int]:
    """The destination's KVM writes kvmclock there as soon as the state is loaded, before the VM runs."""
    return {clock_address(vcpu) // PAGE_BYTES for vcpu in range(vcpus)}


async def move(source: Host, destination: Host) -> None:
    async with await source.connect() as ours, await destination.connect() as theirs:
        await ours.prepare_source()
        await theirs.prepare_destination()
        checks = compare(await ours.describe(), await theirs.describe())
        assert [check for check in checks if not check.passed] == []
        await source.works()
        await theirs.load(state_with_ram(ours, source, destination))
        assert await theirs.status() == "paused"
        assert await ours.status() == "postmigrate"
        assert pages_that_differ(source.ram, destination.ram) <= clock_pages(source.vcpus)
        resumed_unix_us = await theirs.cont()
        assert ours.stopped_unix_us is not None
        assert resumed_unix_us > ours.stopped_unix_us
        await destination.works()
        assert source.stands()
        await theirs.quit()
        destination.process.wait(WAIT_S_MAX)


@accelerators
@pytest.mark.parametrize(("machine", "vcpus"), [("pc", 1), ("q35", 2)])
async def test_move(directory: Path, accelerator: str, machine: str, vcpus: int) -> None:
    with pair(directory, accelerator, machine=machine, vcpus=vcpus) as (source, destination):
        await move(source, destination)


def test_move_on_uvloop(directory: Path) -> None:
    with pair(directory, "tcg") as (source, destination):
        uvloop.run(move(source, destination))


@accelerators
async def test_describe(directory: Path, accelerator: str) -> None:
    with host(directory, "vm", accelerator, machine="q35", vcpus=2) as vm:
        async with await vm.connect() as vmm:
            description = await vmm.describe()
    assert description.vmm.startswith("qemu ")
    assert description.machine_type.startswith("pc-q35-")
    assert description.vcpus == 2
    assert description.status == "running"
    assert description.memory == (MemoryBackend("mem", RAM_MIB * MIB, shared=True),)
    assert description.capabilities == ()
    assert description.accelerator == accelerator


@accelerators
async def test_source_that_is_left_early_runs_on_and_can_be_moved(directory: Path, accelerator: str) -> None:
    with pair(directory, accelerator) as (source, destination):
        async with await source.connect() as vmm:
            await source.works()
            async with aclosing(vmm.suspend()) as chunks:
                await anext(chunks)
                assert source.stands()
            assert await vmm.status() == "running"
            await source.works()
        await move(source, destination)


@accelerators
async def test_source_that_is_saved_can_be_resumed_and_moved(directory: Path, accelerator: str) -> None:
    with pair(directory, accelerator) as (source, destination):
        async with await source.connect() as vmm:
            await source.works()
            state = b"".join([chunk async for chunk in vmm.suspend()])
            assert 0 < len(state) < STATE_BYTES_MAX
            assert await vmm.status() == "postmigrate"
            with pytest.raises(CommandError, match="paused due to previous migration"):
                await anext(vmm.suspend())
            assert await vmm.status() == "postmigrate"
            await vmm.cancel()
            assert await vmm.status() == "postmigrate"
            await vmm.resume()
            await vmm.resume()
            await source.works()
        await move(source, destination)


async def test_cancelled_reader_lets_the_source_run_on(directory: Path) -> None:
    with host(directory, "vm", "tcg") as vm:
        async with await vm.connect() as vmm:
            await vm.works()
            first = asyncio.Event()

            async def take_one() -> None:
                async for _ in vmm.suspend():
                    first.set()
                    await asyncio.Event().wait()

            reader = asyncio.create_task(take_one())
            await asyncio.wait_for(first.wait(), WAIT_S_MAX)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await vm.works()


async def test_paused_source_stays_paused(directory: Path) -> None:
    with host(directory, "vm", "tcg") as vm:
        async with await vm.connect() as vmm:
            await vm.works()
            await vmm.stop()
            async with aclosing(vmm.suspend()) as chunks:
                await anext(chunks)
            assert await vmm.status() in ("paused", "postmigrate")
            assert vm.stands()
            await vmm.cont()
            await vm.works()


async def set_ignore_shared(vm: Host, on: bool) -> None:
    """What somebody else might do at another monitor."""
    client = QMPClient("test")
    await client.connect(str(vm.socket))
    capability = {"capability": "x-ignore-shared", "state": on}
    await client.execute("migrate-set-capabilities", {"capabilities": [capability]})
    await client.disconnect()


async def test_destination_that_does_not_leave_memory_out(directory: Path) -> None:
    with pair(directory, "tcg") as (source, destination):
        async with await source.connect() as ours:
            await ours.prepare_source()
            async with await destination.connect() as theirs:
                await theirs.prepare_destination()
            await set_ignore_shared(destination, False)
            await source.works()
            async with await destination.connect() as theirs:
                checks = compare(await ours.describe(), await theirs.describe())
                failed = [check.name for check in checks if not check.passed]
                assert failed == ["destination leaves shared memory out"]
                with pytest.raises(FarfaultError, match="did not load the device state"):
                    await theirs.load(state_with_ram(ours, source, destination))
            await ours.resume()
            await source.works()


async def test_suspend_turns_on_what_somebody_turned_off(directory: Path) -> None:
    with host(directory, "vm", "tcg") as vm:
        async with await vm.connect() as vmm:
            await vmm.prepare_source()
        await set_ignore_shared(vm, False)
        async with await vm.connect() as vmm:
            await vm.works()
            assert len(b"".join([chunk async for chunk in vmm.suspend()])) < STATE_BYTES_MAX


async def test_destination_that_does_not_wait(directory: Path) -> None:
    with host(directory, "source", "tcg") as source, host(directory, "destination", "tcg") as destination:
        async with await source.connect() as ours, await destination.connect() as theirs:
            await ours.prepare_source()
            with pytest.raises(PreflightError, match="does not wait for a VM"):
                await theirs.prepare_destination()
            await source.works()
            with pytest.raises(FarfaultError, match="'-incoming' was not specified"):
                await theirs.load(state_with_ram(ours, source, destination))
            assert await ours.status() == "running"
            await source.works()


@accelerators
async def test_destination_that_is_killed_while_it_loads(directory: Path, accelerator: str) -> None:
    with pair(directory, accelerator) as (source, destination):
        async with await source.connect() as ours, await destination.connect() as theirs:
            await theirs.prepare_destination()
            await source.works()

            async def half() -> AsyncIterator[bytes]:
                async for chunk in state_with_ram(ours, source, destination):
                    yield chunk[: len(chunk) // 2]
                    destination.process.kill()

            with pytest.raises(FarfaultError, match="did not load the device state"):
                await theirs.load(half())
            await asyncio.wait_for(theirs.wait_closed(), WAIT_S_MAX)
            await ours.resume()
            await source.works()


async def test_destination_refuses_garbage(directory: Path) -> None:
    async def garbage() -> AsyncIterator[bytes]:
        yield bytes(STATE_BYTES_MAX)

    with host(directory, "vm", "tcg", "-incoming", "defer") as vm:
        async with await vm.connect() as vmm:
            await vmm.prepare_destination()
            with pytest.raises(FarfaultError, match="did not load the device state"):
                await vmm.load(garbage())


async def test_source_that_is_killed_while_it_saves(directory: Path) -> None:
    with host(directory, "vm", "tcg") as vm:
        async with await vm.connect() as vmm:
            await vm.works()
            with suppress(FarfaultError):  # it may have saved everything before it was killed
                async for _ in vmm.suspend():
                    vm.process.kill()
                    vm.process.wait(WAIT_S_MAX)
            with pytest.raises(UnreachableError):
                await vmm.status()


async def test_second_client_is_told_of_the_first(directory: Path) -> None:
    with host(directory, "vm", "tcg") as vm:
        async with await vm.connect() as vmm:
            with pytest.raises(UnreachableError, match="one QMP client at a time"):
                await QmpVmm.connect(vm.socket, timeout_s=0.3)
            assert await vmm.status() == "running"
        async with await vm.connect() as vmm:
            assert await vmm.status() == "running"


async def test_vm_that_was_saved_while_it_ran_does_not_start_on_its_own(directory: Path) -> None:
    """Its run state says that it shall run; that is for the hand-over to say."""

    async def save_running(source: Host) -> AsyncIterator[bytes]:
        async with await source.connect() as vmm:
            await vmm.prepare_source()
        connection = await QmpConnection.connect(source.socket, WAIT_S_MAX)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            await connection.pass_descriptor(theirs.fileno(), "state")
            theirs.close()
            await connection.execute("migrate", {"uri": "fd:state"})
            while chunk := await asyncio.get_running_loop().sock_recv(ours, STATE_BYTES_MAX):
                yield chunk
        await connection.close()

    with (
        host(directory, "source", "tcg") as source,
        host(directory, "destination", "tcg", "-incoming", "defer", shared_ram=source.ram) as destination,
    ):
        async with await source.connect():
            await source.works()
        async with await destination.connect() as vmm:
            await vmm.prepare_destination()
            await vmm.load(save_running(source))
            assert await vmm.status() == "paused"
            await vmm.cont()
            await destination.works()


async def test_a_start_is_told_whoever_started_the_vm(directory: Path) -> None:
    with host(directory, "vm", "tcg") as vm:
        async with await vm.connect() as vmm:
            await vm.works()
            assert vmm.started_unix_us == 0
            async for _ in vmm.suspend():
                pass
            assert vmm.stopped_unix_us is not None
            await vmm.resume()
            async with asyncio.timeout(WAIT_S_MAX):
                await vmm.wait_started()
            assert vmm.started_unix_us > vmm.stopped_unix_us
