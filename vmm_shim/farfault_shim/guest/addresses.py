"""Where the guest keeps its own things in low memory: guest physical addresses, as in ``guest.S``.

::

    0x01000  PML4, PDPT (written by the firmware; a VMM that starts the worker itself may put them anywhere)
    0x07000  number of the next vCPU that starts, stacks for one iretq each at 0xC000
    0x08000  worker: its code, at most one page
    0x09000  parameter block
    0x0A000  mailboxes, 128 bytes a vCPU
    0x20000  latency histograms, a page a vCPU; steps of a skew's classes behind each
    0x60000  kvmclock, a page a vCPU
    0xA0000  not RAM
    0x100000 page directories, a page for each GiB
    0x200000 first address that data pages may have
"""

from __future__ import annotations

from farfault_shim.layout import Gpa

VCPUS_MAX = 64
PAGE_BYTES = 4096

WORKER = Gpa(0x8000)
PARAMETERS = Gpa(0x9000)
MAILBOXES = Gpa(0xA000)
MAILBOX_BYTES = 128
HISTOGRAMS = Gpa(0x20000)
CLOCKS = Gpa(0x60000)
DATA_START_MIN = Gpa(0x200000)

MAPPED_GIB_MAX = 256
"""GiB of identity map that the page directories have room for."""


def mailbox_address(vcpu: int) -> Gpa:
    """Of the vCPU's mailbox, 128 bytes. Raises IndexError for a vCPU that cannot be."""
    return Gpa(MAILBOXES + _checked(vcpu) * MAILBOX_BYTES)


def histogram_address(vcpu: int) -> Gpa:
    """Of the vCPU's latency histogram, 64 u64. Raises IndexError for a vCPU that cannot be."""
    return Gpa(HISTOGRAMS + _checked(vcpu) * PAGE_BYTES)


def clock_address(vcpu: int) -> Gpa:
    """Of the page that KVM updates for the vCPU's kvmclock. Raises IndexError for a vCPU that cannot be."""
    return Gpa(CLOCKS + _checked(vcpu) * PAGE_BYTES)


def _checked(vcpu: int) -> int:
    if not 0 <= vcpu < VCPUS_MAX:
        raise IndexError(f"vCPU {vcpu} is outside 0..{VCPUS_MAX - 1}")
    return vcpu
