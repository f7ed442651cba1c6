"""The self-verifying guest: a firmware that fills its RAM, then verifies and changes every page, for ever.

It runs in any VMM that starts a PC firmware, and its worker in any VMM that can set registers. From outside:

    image = GuestParameters.for_ram(128 << 20, vcpus=2, machine="pc").apply(load_image())
    ... qemu-system-x86_64 -bios <a file with image> ...
    read_mailboxes("/dev/shm/vm.ram", vcpus=2)[0].errors
"""

from farfault_shim.guest.mailbox import (
    Histogram,
    Mailbox,
    WorkerState,
    read_class_steps,
    read_histogram,
    read_mailboxes,
    total_touched,
)
from farfault_shim.guest.parameters import GuestKind, GuestParameters, Machine
from farfault_shim.guest.program import load_image, worker_code
from farfault_shim.guest.verify import RamCheck, verify_ram

__all__ = [
    "GuestKind",
    "GuestParameters",
    "Histogram",
    "Machine",
    "Mailbox",
    "RamCheck",
    "WorkerState",
    "load_image",
    "read_class_steps",
    "read_histogram",
    "read_mailboxes",
    "total_touched",
    "verify_ram",
    "worker_code",
]
