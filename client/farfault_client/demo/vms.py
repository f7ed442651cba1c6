"""VMs that run the self-verifying guest: their command lines, and what they have seen."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from farfault_cli.errors import UsageError
from farfault_shim.guest import GuestKind, GuestParameters, Mailbox, load_image, read_mailboxes

from farfault_client.demo.processes import farfault_argv

QEMU = "qemu-system-x86_64"


class VmmKind(Enum):
    """Which VMM runs the guest."""

    QEMU = "qemu"
    REFERENCE = "reference"
    SIMULATED = "simulated"

    @classmethod
    def best(cls) -> VmmKind:
        """The most real one that this machine has."""
        if not os.access("/dev/kvm", os.R_OK | os.W_OK):
            return cls.SIMULATED
        return cls.QEMU if shutil.which(QEMU) else cls.REFERENCE

    @property
    def title(self) -> str:
        return {
            VmmKind.QEMU: "QEMU on KVM, unmodified",
            VmmKind.REFERENCE: "the reference VMM on KVM",
            VmmKind.SIMULATED: "the reference VMM on the simulated KVM",
        }[self]


@dataclass(frozen=True, slots=True)
class GuestVm:
    """One side of a move.

    Attributes:
        kind: of the VMM.
        name: ``source`` or ``destination``; names its files.
        folder: for sockets and the firmware.
        ram: the RAM file.
        ram_bytes: its size.
        vcpus: of the VM.
        guest: what it does with its memory; the reference VMM knows no skewed one.
        seed: of the simulated KVM.
        hugepages: the RAM file lies on hugetlbfs.
    """

    kind: VmmKind
    name: str
    folder: Path
    ram: Path
    ram_bytes: int
    vcpus: int = 1
    guest: GuestKind = GuestKind.SEQUENTIAL
    seed: int = 1
    pages_max: int | None = None

    @property
    def qmp(self) -> Path:
        """Its QMP socket."""
        return self.folder / f"{self.name}.qmp"

    @property
    def parameters(self) -> GuestParameters:
        """What the guest works on."""
        return GuestParameters.for_ram(self.ram_bytes, self.vcpus, "pc", kind=self.guest, pages_max=self.pages_max)

    def argv(self, *, incoming: bool = False, attach: Path | None = None, fault_source: str = "") -> list[str]:
        """Its command line.

        Args:
            incoming: start to receive.
            attach: the receiver's socket, for a destination.
            fault_source: of a destination.
        """
        if self.kind is not VmmKind.QEMU:
            if self.guest.is_skewed:
                raise UsageError(f"{self.kind.title} runs no {self.guest.value} guest", "use QEMU")
            return self._reference_argv(incoming=incoming, attach=attach, fault_source=fault_source)
        command = self._qemu_argv(incoming=incoming)
        if attach is None:
            return command
        launcher = ["run", "--attach", str(attach), "--ram", str(self.ram), "--fault-source", fault_source]
        return farfault_argv(*launcher, "--", *command)

    def mailboxes(self) -> list[Mailbox]:
        """What the guest reports."""
        return read_mailboxes(self.ram, self.vcpus)

    def has_passes(self, count: int) -> bool:
        """Has every vCPU verified all of its pages `count` times?"""
        try:
            return all(mailbox.passes >= count for mailbox in self.mailboxes())
        except (OSError, ValueError):  # not started
            return False

    def _qemu_argv(self, *, incoming: bool) -> list[str]:
        firmware = self.folder / "guest.bin"
        if not firmware.exists():
            firmware.write_bytes(self.parameters.apply(load_image()))
        backend = f"memory-backend-file,id=ram,size={self.ram_bytes},mem-path={self.ram},share=on"
        command = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm"]
        command += ["-machine", "pc,memory-backend=ram", "-object", backend, "-m", f"{self.ram_bytes >> 20}M"]
        command += ["-smp", str(self.vcpus), "-bios", str(firmware)]
        command += ["-qmp", f"unix:{self.qmp},server=on,wait=off"]
        return [*command, "-incoming", "defer"] if incoming else command

    def _reference_argv(self, *, incoming: bool, attach: Path | None, fault_source: str) -> list[str]:
        command = ["reference-vmm", "--ram", str(self.ram), "--size", f"{self.ram_bytes >> 20}MiB"]
        command += ["--vcpus", str(self.vcpus), "--qmp", str(self.qmp)]
        command += ["--random"] if self.guest is GuestKind.RANDOM else []
        command += ["--pages", str(self.pages_max)] if self.pages_max is not None else []
        command += ["--simulated", "--seed", str(self.seed)] if self.kind is VmmKind.SIMULATED else []
        command += ["--incoming", "defer"] if incoming else []
        if attach is not None:
            command += ["--attach", str(attach)]
            command += [] if self.kind is VmmKind.SIMULATED else ["--fault-source", fault_source]
        return farfault_argv(*command)
