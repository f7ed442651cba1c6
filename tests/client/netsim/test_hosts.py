"""Two network namespaces: they reach each other and nobody else, and nothing of them stays behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from farfault_cli.errors import PreflightError
from farfault_client.netsim import hosts
from farfault_client.netsim.hosts import DESTINATION_ADDRESS, PROXY_ADDRESS, SOURCE_ADDRESS, check_namespaces, two_hosts

GONE_TIMEOUT_S = 30.0
ANSWER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print(listener.getsockname()[1], flush=True)
listener.accept()[0].sendall(b"here")
"""
ASK = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 10).recv(9).decode())"
HOLD = "from farfault_client.netsim.hosts import two_hosts\nwith two_hosts() as h: print(h, flush=True); input()"


@pytest.fixture(autouse=True)
def _needs_namespaces(request: pytest.FixtureRequest) -> None:
    if "refused" in request.node.name:
        return
    try:
        check_namespaces()
    except PreflightError as error:
        pytest.skip(error.problem)


def ask(prefix: tuple[str, ...], address: str, port: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*prefix, sys.executable, "-c", ASK, address, port], capture_output=True, text=True)


@pytest.mark.parametrize("address", [SOURCE_ADDRESS, PROXY_ADDRESS, DESTINATION_ADDRESS])
def test_hosts_reach_each_other_and_are_not_reached_from_here(address: str) -> None:
    with two_hosts() as joined:
        at_destination = address == DESTINATION_ADDRESS
        here = joined.destination_prefix if at_destination else joined.source_prefix
        there = joined.source_prefix if at_destination else joined.destination_prefix
        command = [*here, sys.executable, "-c", ANSWER, address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as answering:
            assert answering.stdout is not None
            port = answering.stdout.readline().strip()
            assert ask((), "127.0.0.1", port).returncode != 0
            assert ask(tuple(there), address, port).stdout == "here\n"


def test_nothing_stays_behind_a_process_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        holders = [int(pid) for pid in re.findall(r"/proc/(\d+)/ns/net", owner.stdout.readline())]
        assert len(holders) == 2
        namespaces = {Path(f"/proc/{pid}/ns/net").readlink() for pid in holders}
        assert len(namespaces | {Path("/proc/self/ns/net").readlink()}) == 3
        owner.kill()
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while any(Path(f"/proc/{pid}/ns/net").exists() for pid in holders):
        assert time.monotonic() < deadline, "the namespaces are still held"
        time.sleep(0.01)


def test_without_root_namespaces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PreflightError, match=r"need root.*\n.*loopback"):
        check_namespaces()


def test_without_iproute2_namespaces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(hosts.shutil, "which", lambda program: None if program == "ip" else program)
    with pytest.raises(PreflightError, match=r"ip is not installed.*\n.*iproute2"):
        check_namespaces()
