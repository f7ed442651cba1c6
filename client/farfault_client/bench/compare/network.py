"""What lies between the hosts of a scenario: loopback or a veth pair, and a proxy where it has a delay or a rate.

The proxy is a program in C (``tests/bench/c/link.c``), or the one in Python where that cannot be compiled: the C one
passes about twice as much in a third of the CPU time, and its timers are not those of whole milliseconds.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_client.bench.compare.scenario import Link, Mode, Scenario
from farfault_client.bench.programs import compiled
from farfault_client.netsim import hosts
from farfault_client.netsim.pipe import LinkModel

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


@cache
def link_program() -> tuple[Path | None, str]:
    """The compiled proxy; None: it cannot be had, and why."""
    try:
        return compiled() / "link", ""
    except FarfaultError as error:
        return None, error.problem.partition("\n")[0]


def describe_proxy() -> str:
    """Which proxy delays bytes here, in words."""
    program, problem = link_program()
    return "in C" if program is not None else f"in Python ({problem})"


def proxy_command(program: Path | None, link: LinkModel, listen: str, to: str, ports: Sequence[int]) -> list[str]:
    """The command line of a proxy that says ``ready`` once it listens, and ends with its standard input.

    Args:
        program: of `link_program`; None: the one in Python.
    """
    if program is not None:
        delay_us, rate = round(link.rtt_s / 2 * 1e6), round(link.bytes_per_s)
        numbers = (delay_us, rate, link.on_the_way_bytes_max, *ports)
        return [str(program), listen, to, *map(str, numbers)]
    command = [sys.executable, "-m", "farfault_client.netsim.proxy", "--listen", listen, "--to", to]
    for port in ports:
        command += ["--port", str(port)]
    return [*command, "--rtt-ms", str(link.rtt_s * 1000), "--rate-bytes", str(link.bytes_per_s)]


@contextmanager
def _proxy(scenario: Scenario, prefix: Sequence[str], listen: str, to: str, ports: Sequence[int]) -> Iterator[None]:
    """Stands on the source's host, whichever side connects: every byte goes once through veth and once through lo."""
    link = LinkModel(rtt_s=scenario.rtt_ms / 1000, bytes_per_s=scenario.rate_bytes_per_s)
    command = [*prefix, *proxy_command(link_program()[0], link, listen, to, ports)]
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
