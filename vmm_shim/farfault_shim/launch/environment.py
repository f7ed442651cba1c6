"""The variables by which the preload library is told what to do (``vmm_shim/preload/real.c``). No I/O."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from farfault_shim.attach.wire import FaultSource
from farfault_shim.sources.choose import Choice
from farfault_shim.sources.kernel_interface import info_capability

MEMFD_PREFIX: Final = "memfd="
"""A RAM region that is a memfd of that name (QEMU: ``memory-backend-memfd`` has the name of its type)."""


def shim_variables(
    library: Path, attach: Path, ram: Sequence[str], choice: Choice, userfaultfd_device_fd: int | None = None
) -> dict[str, str]:
    """The variables, without what the environment already has.

    Args:
        library: the preload library.
        attach: the receiver's socket, absolute.
        ram: absolute paths or ``memfd=NAME``, in the order of their flat offsets.
        choice: with a source.
        userfaultfd_device_fd: an inherited descriptor of ``/dev/userfaultfd``.
    """
    assert choice.source is not None
    variables = {
        "LD_PRELOAD": str(library),
        "FARFAULT_ATTACH": str(attach),
        "FARFAULT_RAM": ":".join(ram),
        "FARFAULT_FAULT_SOURCE": choice.source.value,
    }
    if choice.source is FaultSource.STOCK_NOWAIT and choice.annotator is not None:
        variables["FARFAULT_ANNOTATOR"] = choice.annotator.render()
    if choice.source is FaultSource.KERNEL_NOWAIT and choice.kernel_interface is not None:
        interface = choice.kernel_interface
        info = info_capability(interface)
        capability = "" if info is None else f":{info}"
        variables["FARFAULT_KERNEL_NOWAIT"] = f"{interface.memslot_flag}{capability}"
    if userfaultfd_device_fd is not None:
        variables["FARFAULT_UFFD_DEV_FD"] = str(userfaultfd_device_fd)
    return variables


def merge(inherited: Mapping[str, str], variables: Mapping[str, str]) -> dict[str, str]:
    """The VMM's environment: ours over the inherited one; our library goes before others in LD_PRELOAD."""
    merged = {name: value for name, value in inherited.items() if not name.startswith("FARFAULT_")} | dict(variables)
    others = inherited.get("LD_PRELOAD", "")
    if others:
        merged["LD_PRELOAD"] = f"{variables['LD_PRELOAD']}:{others}"
    return merged


def as_shell(variables: Mapping[str, str]) -> str:
    """``export`` lines."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def as_json(variables: Mapping[str, str]) -> str:
    """One JSON object."""
    return json.dumps(variables, indent=2) + "\n"
