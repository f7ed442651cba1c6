"""Numbers and structs of ``linux/kvm.h`` for x86-64, as far as they are needed here; a test compares them
with the header. Names are the header's, without ``KVM_`` where the module name says it.

Sources: Linux ``include/uapi/linux/kvm.h``, ``arch/x86/include/uapi/asm/kvm.h``,
``Documentation/virt/kvm/api.rst``. What no mainline kernel has is marked *series*: its numbers are those of
the posted patches, and another kernel may use others.
"""

from __future__ import annotations

import struct
from typing import Final

DEVICE: Final = "/dev/kvm"
API_VERSION: Final = 12

# ---- ioctl requests --------------------------------------------------------------------------------

GET_API_VERSION: Final = 0xAE00
CREATE_VM: Final = 0xAE01
CHECK_EXTENSION: Final = 0xAE03
GET_VCPU_MMAP_SIZE: Final = 0xAE04
GET_SUPPORTED_CPUID: Final = 0xC008AE05

CREATE_VCPU: Final = 0xAE41
SET_USER_MEMORY_REGION: Final = 0x4020AE46
SET_USER_MEMORY_REGION2: Final = 0x40A0AE49
"""Linux 6.8."""
SET_TSS_ADDR: Final = 0xAE47
CREATE_IRQCHIP: Final = 0xAE60
SET_CLOCK: Final = 0x4030AE7B
GET_CLOCK: Final = 0x8030AE7C
ENABLE_CAP: Final = 0x4068AEA3

RUN: Final = 0xAE80
GET_REGS: Final = 0x8090AE81
SET_REGS: Final = 0x4090AE82
GET_SREGS: Final = 0x8138AE83
SET_SREGS: Final = 0x4138AE84
TRANSLATE: Final = 0xC018AE85
GET_MSRS: Final = 0xC008AE88
SET_MSRS: Final = 0x4008AE89
SET_SIGNAL_MASK: Final = 0x4004AE8B
GET_FPU: Final = 0x81A0AE8C
SET_FPU: Final = 0x41A0AE8D
SET_CPUID2: Final = 0x4008AE90
GET_XSAVE: Final = 0x9000AEA4
SET_XSAVE: Final = 0x5000AEA5

# ---- capabilities ----------------------------------------------------------------------------------

CAP_USER_MEMORY: Final = 3
CAP_NR_VCPUS: Final = 9
CAP_NR_MEMSLOTS: Final = 10
CAP_XSAVE: Final = 55
CAP_MAX_VCPUS: Final = 66
CAP_READONLY_MEM: Final = 81
CAP_IMMEDIATE_EXIT: Final = 136
CAP_USER_MEMORY2: Final = 231
"""Linux 6.8."""
CAP_MEMORY_FAULT_INFO: Final = 232
"""Linux 6.8."""
CAP_MEMORY_ATTRIBUTES: Final = 233
"""Linux 6.8."""
CAP_GUEST_MEMFD: Final = 234
"""Linux 6.8."""
CAP_EXIT_ON_MISSING: Final = 236
"""Series: EXIT_ON_MISSING v6 and v7."""

# ---- memslot flags ---------------------------------------------------------------------------------

MEM_LOG_DIRTY_PAGES: Final = 1 << 0
MEM_READONLY: Final = 1 << 1
MEM_GUEST_MEMFD: Final = 1 << 2
"""Linux 6.8."""
MEM_EXIT_ON_MISSING: Final = 1 << 3
"""Series: EXIT_ON_MISSING v6 and v7."""

# ---- exits -----------------------------------------------------------------------------------------

EXIT_UNKNOWN: Final = 0
EXIT_IO: Final = 2
EXIT_HLT: Final = 5
EXIT_MMIO: Final = 6
EXIT_SHUTDOWN: Final = 8
EXIT_FAIL_ENTRY: Final = 9
EXIT_INTR: Final = 10
EXIT_INTERNAL_ERROR: Final = 17
EXIT_MEMORY_FAULT: Final = 39
"""Linux 6.8."""

EHWPOISON: Final = 133
"""errno of an access to poisoned memory (asm-generic/errno.h); Python's errno lacks it."""

MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
"""Linux 6.8."""
MEMORY_EXIT_FLAG_USERFAULT: Final = 1 << 4
"""Series: KVM Userfault."""

# ---- structs ---------------------------------------------------------------------------------------

MEMORY_REGION: Final = struct.Struct("<IIQQQ")
"""kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr."""
MEMORY_REGION2: Final = struct.Struct("<IIQQQQIIQ104x")
"""kvm_userspace_memory_region2: the same, then guest_memfd_offset, guest_memfd, padding, and userfault_bitmap
where KVM Userfault (series) has it, in the first word of the final padding."""
REGS: Final = struct.Struct("<18Q")
"""kvm_regs: rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8 to r15, rip, rflags."""
SEGMENT: Final = struct.Struct("<QIH10B")
"""kvm_segment: base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable, padding."""
SREGS_BYTES: Final = 312
"""kvm_sregs: eight segments (cs, ds, es, fs, gs, ss, tr, ldt), gdt, idt, then `SREGS_CONTROL`, then a bitmap."""
SREGS_CONTROL: Final = struct.Struct("<7Q")
"""Part of kvm_sregs: cr0, cr2, cr3, cr4, cr8, efer, apic_base."""
SREGS_CONTROL_OFFSET: Final = 224
TRANSLATION: Final = struct.Struct("<QQBBB5x")
"""kvm_translation: linear_address, physical_address, valid, writeable, usermode."""
MSRS: Final = struct.Struct("<II")
"""kvm_msrs: nmsrs, padding; then the entries."""
MSR_ENTRY: Final = struct.Struct("<IIQ")
"""kvm_msr_entry: index, reserved, data."""
CPUID2: Final = struct.Struct("<II")
"""kvm_cpuid2: nent, padding; then the entries."""
CPUID_ENTRY: Final = struct.Struct("<7I12x")
"""kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx."""
ENABLE_CAP_ARGUMENT: Final = struct.Struct("<II4Q64x")
"""kvm_enable_cap: cap, flags, args."""
SIGNAL_MASK: Final = struct.Struct("<I8s")
"""kvm_signal_mask with the kernel's 64-bit set: len, sigset."""
CLOCK_DATA: Final = struct.Struct("<QI4xQQ16x")
"""kvm_clock_data: clock, flags, realtime, host_tsc."""
FPU_BYTES: Final = 416
XSAVE_BYTES: Final = 4096

CPUID_ENTRIES_MAX: Final = 256
MSRS_MAX: Final = 64

# ---- struct kvm_run --------------------------------------------------------------------------------

RUN_IMMEDIATE_EXIT: Final = 1
RUN_EXIT_REASON: Final = 8
RUN_UNION: Final = 32
RUN_UNION_BYTES: Final = 256
RUN_MMIO: Final = struct.Struct("<Q8sIB")
"""At `RUN_UNION`: phys_addr, data, len, is_write."""
RUN_MMIO_DATA: Final = RUN_UNION + 8
RUN_MEMORY_FAULT: Final = struct.Struct("<QQQ")
"""At `RUN_UNION`: flags, gpa, size."""

# ---- MSRs and CPU identification -------------------------------------------------------------------

MSR_TSC: Final = 0x10
MSR_KVM_SYSTEM_TIME_NEW: Final = 0x4B564D01
CPUID_KVM_FEATURES: Final = 0x40000001
