"""The network proxy as a child process, and ports for it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Self

PROXY_ADDRESS = "127.0.0.2"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, neither on 127.0.0.1 nor on the proxy's address."""
    held = []
    for _ in range(count):
        probe = socket.socket()
        probe.bind(("0.0.0.0", 0))
        held.append(probe)
    ports = [probe.getsockname()[1] for probe in held]
    for probe in held:
        probe.close()
    return ports


class Proxy:
    """Stands on 127.0.0.2 before servers on 127.0.0.1. A context manager."""

    def __init__(self, ports: Sequence[int], *, rtt_ms: float = 0, rate_bytes: float = 0, seed: int = 0) -> None:
        command = [sys.executable, "-m", "farfault_client.netsim.proxy", "--listen", PROXY_ADDRESS, "--to", "127.0.0.1"]
        for port in ports:
            command += ["--port", str(port)]
        command += ["--rtt-ms", str(rtt_ms), "--rate-bytes", str(rate_bytes), "--seed", str(seed)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def tell(self, line: str) -> None:
        """One line of the proxy's standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
