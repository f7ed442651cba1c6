"""`farfault serve --qmp` with a real QEMU: suspend, kill the server, take the lease up again, roll back."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from farfault.v1 import pages_pb2 as pb
from server_client import PAGE, TIMEOUT_S, Client, connected, eventually, refused
from test_serve_command import served

QEMU = shutil.which("qemu-system-x86_64")
RAM_BYTES = 64 << 20

pytestmark = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86_64")


class Qemu:
    """A QEMU without a guest to speak of, with a second QMP socket for the test."""

    def __init__(self, directory: Path, ram: Path) -> None:
        self.qmp = directory / "qmp"
        self.probe = directory / "probe"
        memory = f"memory-backend-file,id=ram,size={RAM_BYTES},mem-path={ram},share=on"
        command = [QEMU, "-M", "q35,memory-backend=ram", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"]
        command += ["-object", memory]
        for path in (self.qmp, self.probe):
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.DEVNULL)

    def status(self) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(self.probe))
            with connection.makefile("rw") as lines:
                lines.readline()
                for command in ("qmp_capabilities", "query-status"):
                    lines.write(json.dumps({"execute": command}) + "\n")
                    lines.flush()
                    while "return" not in (answer := json.loads(lines.readline())):
                        pass
                return answer["return"]["status"]


@pytest.fixture
def ram() -> Iterator[Path]:
    path = Path("/dev/shm") / f"ff-{os.getpid()}-serve-qemu"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
async def qemu(tmp_path, ram):
    qemu = Qemu(tmp_path, ram)
    try:
        await eventually(qemu.probe.exists)
        yield qemu
    finally:
        qemu.process.kill()
        qemu.process.wait()


async def suspend(client: Client) -> pb.DeviceStateChunk:
    """The last chunk, once the call has ended: the device state is recorded by then."""
    size, last = 0, pb.DeviceStateChunk()
    async for chunk in client.source.Suspend(pb.SuspendRequest(), metadata=client.metadata, timeout=TIMEOUT_S):
        assert not last.last
        size, last = size + len(chunk.data), chunk
    assert last.last
    assert size > 1000
    return last


async def test_a_move_over_a_killed_server(qemu, ram, tmp_path):
    arguments = ("--ram", ram, "--qmp", qemu.qmp)
    async with served(tmp_path, *arguments) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        assert opened.vm_state == pb.VM_STATE_RUNNING
        answer = await client.source.DescribeVm(pb.DescribeVmRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert answer.description.vcpus == 1
        assert "x-ignore-shared" in answer.description.capabilities
        last = await suspend(client)
        assert qemu.status() == "postmigrate"
        await server.end(signal.SIGKILL)
    assert qemu.status() == "postmigrate"
    async with served(tmp_path, *arguments) as server, connected(server.port) as client:
        resumed = await client.resume(opened, last.generation)
        assert resumed.vm_state == pb.VM_STATE_FROZEN
        (first,) = await client.fetch((0, 0, 1))
        with ram.open("rb") as file:
            assert first == file.read(PAGE)
        hand_over = pb.HandOverRequest(generation=last.generation)
        await client.source.HandOver(hand_over, metadata=client.metadata, timeout=TIMEOUT_S)
        call = client.source.Resume(pb.ResumeRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert (await refused(call))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert await server.end(signal.SIGTERM) == 0
    assert qemu.status() == "postmigrate"


async def test_roll_back(qemu, ram, tmp_path):
    async with (
        served(tmp_path, "--ram", ram, "--qmp", qemu.qmp) as server,
        connected(server.port) as client,
    ):
        await client.open(pb.LEASE_KIND_MIGRATION)
        await suspend(client)
        await client.source.Resume(pb.ResumeRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert qemu.status() == "running"
        await suspend(client)
        await client.pages.Release(pb.ReleaseRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert qemu.status() == "running"


async def test_the_memory_of_a_running_qemu(qemu, ram, tmp_path):
    """The descriptor of a RAM file that has no name any more."""
    await eventually(ram.exists)
    ram.unlink()
    arguments = ("--pid", qemu.process.pid, "--ram", ram, "--qmp", qemu.qmp)
    async with served(tmp_path, *arguments) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        assert opened.regions[0].size_bytes == RAM_BYTES
        await suspend(client)
        pages = await client.fetch((0, 0, 16))
        assert len(pages) == 16
        qemu.process.kill()
        qemu.process.wait()
        await eventually(lambda: "does not answer" in server.log.read_text())
        assert await client.fetch((0, 0, 16)) == pages  # a dead VMM takes no memory with it
