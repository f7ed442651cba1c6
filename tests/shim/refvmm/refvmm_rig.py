"""Reference VMs for tests: RAM on tmpfs, either KVM, bounded waits."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from farfault_shim.guest import GuestParameters, Machine, Mailbox, read_mailboxes
from farfault_shim.guest.program import image_path
from farfault_shim.kvm.interface import Vm
from farfault_shim.kvm.real import RealVm, install_kick_signal
from farfault_shim.refvmm.boot import load_guest
from farfault_shim.refvmm.machine import ReferenceVm
from farfault_shim.refvmm.memory import GuestMemory

MIB = 1 << 20
WAIT_S_MAX = 60.0
POLL_S = 0.002
_numbers = itertools.count()

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened")
needs_image = pytest.mark.skipif(not image_path().exists(), reason="the guest image is not built: make native")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_S_MAX} s: {what}"
        time.sleep(POLL_S)


@contextmanager
def ram_path() -> Iterator[Path]:
    """A file name in shared memory; the file is removed afterwards."""
    path = Path(f"/dev/shm/ff-{os.getpid()}-refvmm-{next(_numbers)}.ram")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def real_kvm(memory: GuestMemory) -> Vm:
    install_kick_signal()
    return RealVm()


@contextmanager
def booted(
    make_kvm: Callable[[GuestMemory], Vm], path: Path, parameters: GuestParameters, ram_bytes: int, machine: Machine
) -> Iterator[ReferenceVm]:
    """A VM in state prelaunch."""
    memory = GuestMemory(path, ram_bytes, machine)
    load_guest(memory, parameters)
    vm = ReferenceVm(make_kvm(memory), memory, parameters.vcpus, kvmclock=parameters.kvmclock)
    try:
        yield vm
    finally:
        vm.close()


def mailboxes(vm: ReferenceVm) -> list[Mailbox]:
    return read_mailboxes(vm.memory.path, vm.vcpus)


def wait_for_passes(vm: ReferenceVm, least: int) -> None:
    def done() -> bool:
        assert not vm.failure
        return all(mailbox.passes >= least for mailbox in mailboxes(vm))

    wait_for(done, f"{least} passes")
