"""What lies between the hosts of a scenario: loopback or a veth pair, and a proxy where it has a delay or a rate."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_client.bench.compare.scenario import Link, Mode, Scenario
from farfault_client.netsim import hosts

LOOPBACK: Final = "127.0.0.1"
LOOPBACK_PROXY: Final = "127.0.0.2"
PROXY_END_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Network:
    """How the two sides reach each other.

    Attributes:
        source, destination: addresses to listen on.
        connect_to: where the side that connects finds the other one, or the proxy before it.
        source_prefix, destination_prefix: before every command of that side.
    """

    source: str
    destination: str
    connect_to: str
    source_prefix: Sequence[str] = ()
    destination_prefix: Sequence[str] = ()


@contextmanager
def network(scenario: Scenario, mode: Mode, ports: Sequence[int]) -> Iterator[Network]:
    """The scenario's network, while the context is open.

    Args:
        mode: QEMU's source connects to its destination; Farfault's receiver to the source's page server.
        ports: that the side which is connected to listens on.
    """
    with ExitStack() as stack:
        source = destination = LOOPBACK
        proxy, prefixes = LOOPBACK_PROXY, hosts.TwoHosts((), ())
        if scenario.link is Link.NAMESPACES:
            prefixes = stack.enter_context(hosts.two_hosts())
            source, destination, proxy = hosts.SOURCE_ADDRESS, hosts.DESTINATION_ADDRESS, hosts.PROXY_ADDRESS
        listening = destination if mode.is_native else source
        if scenario.has_proxy:
            stack.enter_context(_proxy(scenario, prefixes.source_prefix, proxy, listening, ports))
        connect_to = proxy if scenario.has_proxy else listening
        yield Network(source, destination, connect_to, prefixes.source_prefix, prefixes.destination_prefix)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, neither on loopback nor on the proxy's address."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("0.0.0.0", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@contextmanager
def _proxy(scenario: Scenario, prefix: Sequence[str], listen: str, to: str, ports: Sequence[int]) -> Iterator[None]:
    """Stands on the source's host, whichever side connects: every byte goes once through veth and once through lo."""
    command = [*prefix, sys.executable, "-m", "farfault_client.netsim.proxy", "--listen", listen, "--to", to]
    for port in ports:
        command += ["--port", str(port)]
    command += ["--rtt-ms", str(scenario.rtt_ms), "--rate-bytes", str(scenario.rate_bytes_per_s)]
    proxy = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert proxy.stdin is not None
    assert proxy.stdout is not None
    try:
        if proxy.stdout.readline() != "ready\n":
            raise FarfaultError("the network proxy did not start")
        yield
    finally:
        proxy.stdin.close()
        try:
            proxy.wait(PROXY_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            proxy.kill()
            proxy.wait()
        proxy.stdout.close()
