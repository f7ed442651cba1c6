"""VMMs on PATH that ``farfault run`` could start."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_shim.launch.checks import find_vmm
from farfault_shim.sources.facts import Finding

NAMES: Final = ("qemu-system-x86_64", "qemu-system-aarch64", "qemu-kvm", "/usr/libexec/qemu-kvm", "/usr/bin/kvm")
VERSION_TIMEOUT_S: Final = 5.0


def find_vmms(names: Iterable[str] = NAMES) -> Iterator[tuple[str, Finding]]:
    """Name and finding of each VMM that is there; one finding that none is, else."""
    found = [name for name in names if shutil.which(name)]
    for name in found:
        yield name, _look_at(name)
    if not found:
        yield "QEMU", Finding(False, "not found on PATH", "install qemu-system-x86 or qemu-kvm, or name another VMM")


def _look_at(name: str) -> Finding:
    try:
        program = find_vmm(name)
        result = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S, check=True
        )
    except FarfaultError as error:
        return Finding(False, error.problem, error.remedy)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(False, f"--version: {error}", "try it by hand")
    first = (result.stdout.splitlines() or ["says nothing"])[0]
    return Finding(True, first.removeprefix("QEMU emulator version "))
