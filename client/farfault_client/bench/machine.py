"""What the figures were measured on, in words."""

from __future__ import annotations

import mmap
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Final

from farfault_cli.python_build import python_build

FIRST_USE_BYTES: Final = 64 << 20


def describe_machine() -> dict[str, str]:
    """Names and values for the head of a report; what cannot be found out is left out."""
    found = {
        "cpu": f"{os.cpu_count()} x {_first_value('/proc/cpuinfo', 'model name')}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / (1 << 30):.0f} GiB",
        "first use of memory": _first_use(),
        "kernel": f"{platform.system()} {platform.release()}",
        "tcp": "".join(_lines("/proc/sys/net/ipv4/tcp_congestion_control")[:1]),
        "kvm": _kvm(),
        "qemu": _first_line("qemu-system-x86_64", "--version"),
        "python": python_build().text,
    }
    return {name: value for name, value in found.items() if value}


def _first_use() -> str:
    """How fast memory is written that this process has not used yet, and how fast the second time.

    A virtual machine may have to wait for its hypervisor to bring it: then everything that installs pages is slow.
    """
    data = bytes(FIRST_USE_BYTES)
    with mmap.mmap(-1, FIRST_USE_BYTES) as memory:
        took_s = []
        for _ in range(2):
            began_at = perf_counter()
            memory[:] = data
            took_s.append(perf_counter() - began_at)
    first, again = (FIRST_USE_BYTES / took / 1e9 for took in took_s)
    return f"{first:.1f} GB/s (again: {again:.1f} GB/s)"


def command_line(arguments: Sequence[str]) -> str:
    """The command as others would type it to measure the same: without options that only say where results go.

    Args:
        arguments: after the program's name.
    """
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--html", "--markdown"):
            next(words, None)
        elif word != "--json" and not word.startswith(("--html=", "--markdown=")):
            kept.append(word)
    return shlex.join(["farfault", *kept])


def _lines(path: str) -> list[str]:
    """Of a file of the kernel's; none where it is not there."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _first_value(path: str, name: str) -> str:
    return next((line.partition(":")[2].strip() for line in _lines(path) if line.startswith(name)), "")


def _kvm() -> str:
    """How KVM maps guest memory here: by hardware (EPT, NPT) or by shadow page tables."""
    for module, flag, name in (("kvm_intel", "ept", "EPT"), ("kvm_amd", "npt", "NPT")):
        parameter = Path(f"/sys/module/{module}/parameters/{flag}")
        if parameter.exists():
            return f"{module}, {name if parameter.read_text().strip() in 'Y1' else 'shadow paging'}"
    if not Path("/dev/kvm").exists():
        return "none"
    return "software virtualised, shadow paging"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip()
