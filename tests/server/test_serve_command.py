"""`farfault serve` as a process: options, signals, death and return."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import pytest
from click.testing import CliRunner
from farfault.v1 import pages_pb2 as pb
from farfault_cli.certs import make_certificates
from farfault_server.command import serve
from server_client import TIMEOUT_S, Client, connected, eventually, page, write_ram

PAGES = [page(number) for number in range(64)]


class Served:
    """A running `farfault serve`."""

    def __init__(self, directory: Path, *arguments: object) -> None:
        self.port_file = directory / "port"
        self.port_file.unlink(missing_ok=True)
        self.log = directory / "log"
        command = [sys.executable, "-m", "farfault_cli", "serve", "--port-file", self.port_file, *arguments]
        if "--listen" not in arguments:
            command += ["--listen", "127.0.0.1:0"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([str(part) for part in command], stderr=log, stdin=subprocess.DEVNULL)
        self.port = 0

    async def ready(self) -> "Served":
        await eventually(lambda: self.port_file.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        self.port = int(self.port_file.read_text())
        return self

    async def end(self, number: int) -> int:
        self.process.send_signal(number)
        await eventually(lambda: self.process.poll() is not None)
        return self.process.returncode


@contextlib.asynccontextmanager
async def served(directory: Path, *arguments: object):
    server = Served(directory, *arguments)
    try:
        yield await server.ready()
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def ram(tmp_path):
    return write_ram(tmp_path / "vm.ram", PAGES)


async def test_sigterm_ends_streams_and_exits_0(ram, tmp_path):
    async with served(tmp_path, "--ram", ram) as server, connected(server.port) as client:
        opened = await client.open()
        assert {lane.kind for lane in opened.lanes} == {
            pb.LANE_KIND_EXPRESS,
            pb.LANE_KIND_BACKGROUND,
            pb.LANE_KIND_EXPRESS_BACKGROUND,
        }
        assert await client.fetch((0, 0, 64)) == PAGES
        stream = client.stream()
        await stream.write(pb.FetchRequest(request_id=1))
        await stream.read()
        os.kill(server.process.pid, signal.SIGTERM)
        assert await asyncio.wait_for(stream.read(), TIMEOUT_S) is grpc.aio.EOF
        await eventually(lambda: server.process.poll() is not None)
        assert server.process.returncode == 0
        assert f"listening on 127.0.0.1:{server.port}" in server.log.read_text()
        assert opened.token not in server.log.read_text()


async def test_killed_and_started_again(ram, tmp_path):
    state = tmp_path / "state"
    async with served(tmp_path, "--ram", ram, "--state", state) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        port = server.port
        await server.end(signal.SIGKILL)
    async with (
        served(tmp_path, "--ram", ram, "--state", state, "--listen", f"127.0.0.1:{port}") as server,
        connected(server.port) as client,
    ):
        resumed = await client.resume(opened, opened.generation)
        assert resumed.lease_id == opened.lease_id
        assert await client.fetch((0, 3, 1)) == [PAGES[3]]


async def test_the_background_process_ends_with_its_parent(ram, tmp_path):
    async with served(tmp_path, "--ram", ram) as server, connected(server.port) as client:
        opened = await client.open()
        side = Client(client.lane(pb.LANE_KIND_BACKGROUND))
        side.opened = opened
        assert await side.fetch((0, 0, 1), name="Background") == [PAGES[0]]
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert len(children) == 1
        await server.end(signal.SIGKILL)
        await eventually(lambda: not is_alive(children[0]))
        await side.close()


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


async def test_sigusr1_writes_the_state_as_json(ram, tmp_path):
    async with served(tmp_path, "--ram", ram, "--json-logs") as server, connected(server.port) as client:
        await client.open()
        os.kill(server.process.pid, signal.SIGUSR1)
        await eventually(lambda: "state: express" in server.log.read_text())
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
        assert any("1 leases" in line["message"] for line in lines)


async def test_metrics(ram, tmp_path):
    async with (
        served(tmp_path, "--ram", ram, "--metrics", "127.0.0.1:0") as server,
        connected(server.port) as client,
    ):
        opened = await client.open()
        await client.fetch((0, 0, 64))
        side = Client(client.lane(pb.LANE_KIND_BACKGROUND))
        side.opened = opened
        await side.fetch((0, 0, 10), name="Background")
        url = server.log.read_text().split("metrics on ")[1].split()[0]

        def metrics() -> str:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                return answer.read().decode()

        expected = [
            'farfault_server_pages_total{kind="data",lane="demand"} 64.0',
            'farfault_server_pages_total{kind="data",lane="background"} 10.0',
            'farfault_server_requests_total{lane="demand"} 1.0',
            'farfault_server_queue_seconds_count{lane="demand"} 1.0',
            'farfault_server_read_seconds_bucket{lane="demand",le="+Inf"} 1.0',
            'farfault_server_leases{kind="clone"} 1.0',
            'farfault_server_vm_state{state="frozen"} 1.0',
            "farfault_server_background_process_up 1.0",
            f"farfault_server_memory_bytes {64 * 4096}.0",
        ]
        text = ""
        async with asyncio.timeout(TIMEOUT_S):
            while not all(line in text for line in expected):
                text = await asyncio.to_thread(metrics)
                await asyncio.sleep(0.05)
        assert opened.lease_id not in text
        await side.close()


async def test_64_gib_without_ram(tmp_path):
    async with served(tmp_path, "--synthetic", "64GiB", "--seed", 3) as server, connected(server.port) as client:
        opened = await client.open()
        assert opened.regions[0].size_bytes == 64 << 30
        assert len(await client.fetch((0, (64 << 18) - 4, 4))) == 4
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        assert int(status.split("VmRSS:")[1].split()[0]) < 200 << 10  # KiB


async def test_admission_and_flags(ram, tmp_path):
    token = tmp_path / "token"
    token.write_text("sesame\n")
    arguments = ["--ram", ram, "--admission-token-file", token, "--no-express", "--no-background-process"]
    async with served(tmp_path, *arguments) as server, connected(server.port) as client:
        with pytest.raises(grpc.aio.AioRpcError):
            await client.open()
        opened = await client.open(metadata=(("authorization", "Bearer sesame"),))
        assert not opened.lanes
        assert "sesame" not in server.log.read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "either --ram or --synthetic"),
        (["--ram", "RAM", "--synthetic", "1G"], "either --ram or --synthetic"),
        (["--ram", "/no/such/ram"], "does not exist"),
        (["--synthetic", "5000"], "multiple of 4096"),
        (["--ram", "RAM", "--listen", "127.0.0.1"], "not an address"),
        (["--ram", "RAM", "--listen", "0.0.0.0:0"], "without TLS"),
        (["--ram", "RAM", "--listen", "192.0.2.1:0", "--insecure"], "cannot listen"),
        (["--ram", "RAM", "--tls", "/no/such/tls"], "not a directory"),
        (["--ram", "RAM", "--qmp", "/no/such/qmp", "--frozen"], "exclude each other"),
        (["--ram", "RAM", "--admission-token-file", "/no/such/token"], "admission token"),
        (["--ram", "RAM", "--metrics", "nowhere"], "not an address"),
    ],
)
def test_wrong_use_says_what_to_do_and_exits_2(ram, tmp_path, arguments, problem):
    command = [
        sys.executable,
        "-m",
        "farfault_cli",
        "serve",
        *(str(ram) if part == "RAM" else part for part in arguments),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 2, ran.stderr
    assert problem in ran.stderr
    assert "remedy: " in ran.stderr
    assert "Traceback" not in ran.stderr


async def test_open_to_the_network_with_tls(ram, tmp_path):
    make_certificates(tmp_path / "tls")
    arguments = ["--ram", ram, "--listen", "0.0.0.0:0", "--tls", tmp_path / "tls" / "server"]
    from farfault_cli.tls import channel_credentials

    async with (
        served(tmp_path, *arguments) as server,
        connected(server.port, channel_credentials(tmp_path / "tls" / "client")) as client,
    ):
        await client.open()
        assert await client.fetch((0, 3, 1)) == [PAGES[3]]


def test_help_teaches():
    result = CliRunner().invoke(serve, ["--help"])
    assert result.exit_code == 0
    for word in ("memory-backend-file", "memfd=pc.ram", "--synthetic 64GiB", "SIGTERM"):
        assert word in result.output
