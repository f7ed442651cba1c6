"""Real QEMUs that run the guest which verifies its own pages; RAM is a file in a directory of tmpfs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen

from farfault_cli.errors import UnreachableError
from farfault_shim.guest import GuestParameters, Mailbox, load_image, read_mailboxes
from farfault_vmm.qmp import QmpVmm

QEMU = shutil.which("qemu-system-x86_64")
WAIT_S_MAX = 60.0
POLL_S = 0.01
MIB = 1 << 20
RAM_MIB = 64
PAGES = 2000


@dataclass(frozen=True)
class Host:
    """One QEMU and its RAM file."""

    process: Popen[bytes]
    ram: Path
    socket: Path
    vcpus: int

    async def connect(self) -> QmpVmm:
        """As soon as QEMU listens."""
        for _ in range(int(WAIT_S_MAX / POLL_S)):
            assert self.process.poll() is None, "QEMU has ended"
            try:
                return await QmpVmm.connect(self.socket)
            except UnreachableError:
                await asyncio.sleep(POLL_S)
        raise AssertionError("QEMU does not listen")

    async def works(self, touches: int = PAGES) -> list[Mailbox]:
        """Waits until each vCPU has touched so many more pages; they are all right, and it was never reset."""
        before = read_mailboxes(self.ram, self.vcpus)
        for _ in range(int(WAIT_S_MAX / POLL_S)):
            assert self.process.poll() is None, "QEMU has ended"
            now = read_mailboxes(self.ram, self.vcpus)
            assert all(mailbox.errors == 0 and mailbox.boots <= 1 for mailbox in now), now
            if all(late.touched > early.touched + touches for early, late in zip(before, now, strict=True)):
                return now
            await asyncio.sleep(POLL_S)
        raise AssertionError(f"the guest does not work: {now}")

    def stands(self) -> bool:
        """Whether the guest's counters do not move. They are read at two moments with a system call in between."""
        return read_mailboxes(self.ram, self.vcpus) == read_mailboxes(self.ram, self.vcpus)


@contextmanager
def host(
    directory: Path,
    name: str,
    accelerator: str,
    *options: str,
    machine: str = "pc",
    vcpus: int = 1,
    shared_ram: Path | None = None,
) -> Iterator[Host]:
    """A QEMU with the guest; with the options ``-incoming defer`` one that waits for it.

    Args:
        shared_ram: the RAM file of another host to use, instead of an empty one.
    """
    parameters = GuestParameters.for_ram(RAM_MIB * MIB, vcpus, machine, pages_max=PAGES)
    firmware, socket = directory / f"{name}.bin", directory / f"{name}.qmp"
    firmware.write_bytes(parameters.apply(load_image()))
    ram = shared_ram or directory / f"{name}.ram"
    if shared_ram is None:
        with ram.open("wb") as file:
            file.truncate(RAM_MIB * MIB)
    command = [
        *(str(QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-accel", accelerator),
        *("-machine", f"{machine},memory-backend=mem", "-m", f"{RAM_MIB}M", "-smp", str(vcpus)),
        *("-object", f"memory-backend-file,id=mem,size={RAM_MIB}M,mem-path={ram},share=on"),
        *("-bios", str(firmware), "-qmp", f"unix:{socket},server=on,wait=off", *options),
    ]
    with Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL) as process:
        try:
            yield Host(process, ram, socket, vcpus)
        finally:
            process.kill()
