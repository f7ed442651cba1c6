"""What a VMM asks of KVM: one interface for /dev/kvm (`real`) and for the simulated KVM (`simulated`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from farfault_shim.kvm.registers import Registers
from farfault_shim.kvm.run_area import RunArea


class MemoryRegion(NamedTuple):
    """Argument of KVM_SET_USER_MEMORY_REGION2; of its first version where the last field is 0.

    Attributes:
        slot: number; setting it again changes or, with `size_bytes` 0, removes it.
        flags: KVM_MEM_*.
        gpa, size_bytes: guest physical memory.
        hva: where it lies in this process.
        userfault_bitmap_hva: of KVM Userfault's bitmap; 0: none.
    """

    slot: int
    flags: int
    gpa: int
    size_bytes: int
    hva: int
    userfault_bitmap_hva: int = 0


class RunResult(NamedTuple):
    """What the system call KVM_RUN returned: 0 or -1, and errno where it is -1."""

    ret: int
    err: int


class Vcpu(Protocol):
    """A vCPU. All but `kick` belongs to the thread that runs it, or to any thread while none runs it."""

    @property
    def number(self) -> int:
        """The argument of KVM_CREATE_VCPU."""

    @property
    def area(self) -> RunArea:
        """struct kvm_run."""

    def run(self) -> RunResult:
        """KVM_RUN. Other threads go on meanwhile."""

    def kick(self) -> None:
        """From any thread: KVM_RUN returns -EINTR now, and always until `area.immediate_exit` is cleared."""

    def get_registers(self) -> Registers:
        """KVM_GET_REGS."""

    def set_registers(self, registers: Registers) -> None:
        """KVM_SET_REGS."""

    def get_special(self) -> bytes:
        """KVM_GET_SREGS: a kvm_sregs."""

    def set_special(self, special: bytes) -> None:
        """KVM_SET_SREGS."""

    def get_xsave(self) -> bytes:
        """KVM_GET_XSAVE: floating point and vector state."""

    def set_xsave(self, xsave: bytes) -> None:
        """KVM_SET_XSAVE."""

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """KVM_GET_MSRS, one by one: those that this KVM does not know are left out."""

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """KVM_SET_MSRS.

        Raises:
            OSError: one of them cannot be set.
        """

    def translate(self, gva: int) -> int | None:
        """KVM_TRANSLATE: the guest physical address, or None where the guest maps nothing."""

    def close(self) -> None:
        """Gives the vCPU's descriptor and mapping back."""


class Vm(Protocol):
    """A virtual machine."""

    @property
    def kind(self) -> str:
        """``kvm`` or ``simulated``: states of one do not load into the other."""

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION: 0 where the capability is not there."""

    def enable_capability(self, capability: int, argument: int = 0) -> None:
        """KVM_ENABLE_CAP. Raises OSError (EINVAL) where it cannot be enabled."""

    def set_memory_region(self, region: MemoryRegion) -> None:
        """KVM_SET_USER_MEMORY_REGION or its second version.

        Raises:
            OSError: EINVAL for a flag that is not known, EEXIST for an overlap, and so on.
        """

    def create_vcpu(self, number: int) -> Vcpu:
        """KVM_CREATE_VCPU, with the CPU identification that KVM supports."""

    def get_clock_ns(self) -> int:
        """KVM_GET_CLOCK: kvmclock's time."""

    def set_clock_ns(self, clock_ns: int) -> None:
        """KVM_SET_CLOCK."""

    def close(self) -> None:
        """Ends the VM. Its vCPUs must be closed first."""
