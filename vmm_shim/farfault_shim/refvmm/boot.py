"""A VM's first memory and registers: the self-verifying worker, entered directly in 64-bit mode at CPL3."""

from __future__ import annotations

import struct
from typing import Final

from farfault_shim.guest import GuestParameters, load_image, worker_code
from farfault_shim.guest.addresses import MAILBOX_BYTES, MAILBOXES, PARAMETERS, VCPUS_MAX, WORKER, clock_address
from farfault_shim.kvm.abi import MSR_KVM_SYSTEM_TIME_NEW
from farfault_shim.kvm.interface import Vcpu
from farfault_shim.kvm.registers import Registers, user_long_mode
from farfault_shim.layout import Gpa
from farfault_shim.refvmm.memory import GuestMemory

PML4: Final = Gpa(0x1000)
PDPT: Final = Gpa(0x2000)
PAGE_DIRECTORIES: Final = Gpa(0x100000)
TABLE_BYTES: Final = 4096
ENTRIES: Final = 512
LARGE_PAGE_BYTES: Final = 2 << 20
TABLE_ENTRY: Final = 0x27
"""Present, writable, user, accessed."""
LARGE_PAGE_ENTRY: Final = 0xE7
"""The same, dirty, 2 MiB: neither processor nor KVM ever has to write to a table."""

_TABLE: Final = struct.Struct(f"<{ENTRIES}Q")
_INTERRUPTS_OFF: Final = 2
_KVMCLOCK_ON: Final = 1


def load_guest(memory: GuestMemory, parameters: GuestParameters) -> None:
    """Writes the worker, its parameters, empty mailboxes and an identity map of RAM.

    Raises:
        FarfaultError: the guest image has not been built.
    """
    memory.write(WORKER, worker_code(load_image()))
    memory.write(PARAMETERS, parameters.pack())
    memory.write(MAILBOXES, bytes(VCPUS_MAX * MAILBOX_BYTES))  # the file may have held a guest before
    for gpa, table in page_tables(parameters.mapped_gib).items():
        memory.write(gpa, table)


def page_tables(mapped_gib: int) -> dict[Gpa, bytes]:
    """An identity map of the first GiB in 2 MiB pages, by guest physical address of the table."""
    directories = [Gpa(PAGE_DIRECTORIES + number * TABLE_BYTES) for number in range(mapped_gib)]
    tables = {
        PML4: _table([PDPT | TABLE_ENTRY]),
        PDPT: _table([directory | TABLE_ENTRY for directory in directories]),
    }
    for number, directory in enumerate(directories):
        first = number * ENTRIES
        tables[directory] = _table([(first + index) * LARGE_PAGE_BYTES | LARGE_PAGE_ENTRY for index in range(ENTRIES)])
    return tables


def set_first_registers(vcpu: Vcpu, *, kvmclock: bool) -> None:
    """The vCPU enters the worker at its next KVM_RUN; its kvmclock page is on if wanted."""
    vcpu.set_special(user_long_mode(vcpu.get_special(), PML4))
    vcpu.set_registers(Registers(rip=WORKER, rdi=vcpu.number, rflags=_INTERRUPTS_OFF))
    if kvmclock:
        vcpu.set_msrs({MSR_KVM_SYSTEM_TIME_NEW: clock_address(vcpu.number) | _KVMCLOCK_ON})


def _table(entries: list[int]) -> bytes:
    return _TABLE.pack(*entries, *([0] * (ENTRIES - len(entries))))
