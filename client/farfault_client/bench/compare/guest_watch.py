"""Reads the guest's counters from its RAM file while it runs.

Only by pread: a load through a mapping would make a page that has not come yet.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time
from pathlib import Path
from typing import Final

from farfault_cli.errors import FarfaultError
from farfault_shim.guest import read_histogram, read_mailboxes, total_touched
from farfault_shim.guest.addresses import clock_address

from farfault_client.bench.compare.guest_figures import GuestSample

SAMPLE_INTERVAL_S: Final = 0.02
SAMPLES_MAX: Final = 500_000
_CLOCK: Final = struct.Struct("<24xIb")
"""tsc_to_system_mul and tsc_shift of struct pvclock_vcpu_time_info."""


def sample(ram: int | Path, vcpus: int) -> GuestSample:
    """The counters now. Pages that are not there yet count nothing."""
    mailboxes = read_mailboxes(ram, vcpus)
    ticks = sum(mailbox.access_ticks for mailbox in mailboxes)
    histograms = [read_histogram(ram, vcpu).counts for vcpu in range(vcpus)]
    accesses = tuple(map(sum, zip(*histograms, strict=True)))
    return GuestSample(time.time_ns() // 1000, total_touched(mailboxes), ticks, accesses)


def ticks_per_us(ram: Path) -> float:
    """The rate of the guest's TSC as kvmclock tells it: ns = (ticks << shift) * multiplier >> 32.

    Raises:
        FarfaultError: KVM offers the guest no kvmclock.
    """
    with ram.open("rb") as file:
        multiplier, shift = _CLOCK.unpack(os.pread(file.fileno(), _CLOCK.size, clock_address(0)))
    if not multiplier:
        raise FarfaultError("the guest has no kvmclock, so its ticks have no unit", "use a KVM that offers kvmclock")
    return float(1000 * 2**32 / (multiplier * 2.0**shift))


class GuestWatch:
    """Collects samples from a VM's RAM file. `run` it as a task.

    Args:
        ram: the file.
        vcpus: of the guest.
    """

    def __init__(self, ram: Path, vcpus: int) -> None:
        self.samples: list[GuestSample] = []
        self._ram = ram
        self._vcpus = vcpus

    async def run(self) -> None:
        """Samples until it is cancelled, or `SAMPLES_MAX` are taken."""
        descriptor = os.open(self._ram, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while len(self.samples) < SAMPLES_MAX:
                self.samples.append(sample(descriptor, self._vcpus))
                await asyncio.sleep(SAMPLE_INTERVAL_S)
        finally:
            os.close(descriptor)

    async def run_until(self, unix_us: int) -> None:
        """Samples once more at or after a moment."""
        await asyncio.sleep(max(0.0, unix_us / 1e6 - time.time()))
        self.samples.append(sample(self._ram, self._vcpus))
