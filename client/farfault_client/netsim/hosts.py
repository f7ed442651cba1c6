"""Two hosts on one machine: network namespaces joined by a veth pair.

The namespaces have no names. Each lives as long as the process that holds it, which ends with its standard input, and
processes in it: however the process that made them ends, nothing stays behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from farfault_cli.errors import FarfaultError, PreflightError

SOURCE_ADDRESS: Final = "10.231.77.1"
DESTINATION_ADDRESS: Final = "10.231.77.2"
PROXY_ADDRESS: Final = "10.231.77.3"
"""A second address of the source's, for a proxy before either side."""
PREFIX_BITS: Final = 29
DEVICE: Final = "farfault0"
"""Of the veth end, in each namespace."""
STEP_TIMEOUT_S: Final = 10.0
_PROGRAMS: Final = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """What runs where.

    Attributes:
        source_prefix, destination_prefix: put before a command, they run it on that host; its pid is the command's.
    """

    source_prefix: Sequence[str]
    destination_prefix: Sequence[str]


def check_namespaces() -> None:
    """Raises PreflightError where namespaces cannot be made, with the remedy."""
    if os.geteuid() != 0:
        raise PreflightError("network namespaces need root", "run as root, or measure with --link loopback")
    for program, package in _PROGRAMS.items():
        if not shutil.which(program):
            raise PreflightError(f"{program} is not installed", f"install {package}, or measure with --link loopback")


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Hosts that reach each other, while the context is open; loopback works in each as well.

    Raises:
        PreflightError: no root, or no iproute2.
        FarfaultError: the kernel refuses.
    """
    check_namespaces()
    with ExitStack() as stack:
        source, destination = (stack.enter_context(_namespace()) for _ in range(2))
        # not `ip netns exec`: that hides tracefs behind a fresh /sys
        prefixes = [("nsenter", f"--net=/proc/{pid}/ns/net") for pid in (source, destination)]
        ends = [["name", DEVICE, "netns", str(pid)] for pid in (source, destination)]
        _run("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        addresses = ((SOURCE_ADDRESS, PROXY_ADDRESS), (DESTINATION_ADDRESS,))
        for prefix, own in zip(prefixes, addresses, strict=True):
            for address in own:
                _run(*prefix, "ip", "address", "add", f"{address}/{PREFIX_BITS}", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _run(*prefix, "ip", "link", "set", device, "up")
        yield TwoHosts(*prefixes)


@contextmanager
def _namespace() -> Iterator[int]:
    """The pid of a process that holds a new namespace."""
    command = ["unshare", "--net", "sh", "-c", "echo ready && exec cat"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            raise FarfaultError(f"no network namespace: {holder.stderr.read().strip()}", "measure with --link loopback")
        yield holder.pid
    finally:
        try:
            holder.communicate(timeout=STEP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            holder.kill()
            holder.communicate()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=STEP_TIMEOUT_S, check=False)
    if done.returncode:
        raise FarfaultError(f"{' '.join(command)}: {done.stderr.strip()}", "measure with --link loopback")
