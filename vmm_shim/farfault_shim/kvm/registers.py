"""A vCPU's registers as KVM exchanges them. No I/O."""

from __future__ import annotations

from typing import Final, NamedTuple, Self

from farfault_shim.kvm import abi

_CS, _DS, _ES, _FS, _GS, _SS = range(6)
_USER_DATA: Final = 0x2B
_USER_CODE64: Final = 0x33
_CR0_LONG_MODE: Final = 0x8001_0033
"""PG, WP, NE, ET, MP, PE."""
_CR4_LONG_MODE: Final = 0x620
"""PAE, OSFXSR, OSXMMEXCPT."""
_EFER_LONG_MODE: Final = 0xD01
"""NXE, LMA, LME, SCE."""


class Registers(NamedTuple):
    """kvm_regs."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2

    def pack(self) -> bytes:
        return abi.REGS.pack(*self)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Self:
        """Raises struct.error for another size."""
        return cls(*abi.REGS.unpack(data))


class ControlRegisters(NamedTuple):
    """The part of kvm_sregs that says how addresses are translated."""

    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int


def control_registers(special: bytes) -> ControlRegisters:
    """Out of a kvm_sregs."""
    return ControlRegisters(*abi.SREGS_CONTROL.unpack_from(special, abi.SREGS_CONTROL_OFFSET))


def user_long_mode(special: bytes, page_table_root: int) -> bytes:
    """A kvm_sregs in which the processor is in 64-bit mode at CPL3, with flat segments.

    Args:
        special: of the vCPU after its reset; what is not changed stays.
        page_table_root: guest physical address of the PML4.
    """
    assert len(special) == abi.SREGS_BYTES
    changed = bytearray(special)
    _set_segment(changed, _CS, _USER_CODE64, kind=11, is_long=True)
    for index in (_DS, _ES, _FS, _GS, _SS):
        _set_segment(changed, index, _USER_DATA, kind=3, is_long=False)
    control = control_registers(special)._replace(
        cr0=_CR0_LONG_MODE, cr3=page_table_root, cr4=_CR4_LONG_MODE, efer=_EFER_LONG_MODE
    )
    abi.SREGS_CONTROL.pack_into(changed, abi.SREGS_CONTROL_OFFSET, *control)
    return bytes(changed)


def _set_segment(special: bytearray, index: int, selector: int, *, kind: int, is_long: bool) -> None:
    """type, present, dpl, db, s, l, g, avl, unusable, padding: Intel SDM volume 3, 3.4.5."""
    attributes = (kind, 1, 3, not is_long, 1, is_long, 1, 0, 0, 0)
    abi.SEGMENT.pack_into(special, index * abi.SEGMENT.size, 0, 0xFFFF_FFFF, selector, *attributes)
