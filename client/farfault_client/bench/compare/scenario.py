"""What is compared, and under which circumstances. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product

from farfault_shim.guest import GuestKind


class Mode(Enum):
    """Who moves the VM, and how its vCPUs miss pages."""

    QEMU = "qemu"
    QEMU_PREEMPT = "qemu-preempt"
    NOWAIT = "farfault-nowait"
    BLOCKING = "farfault-blocking"

    @property
    def is_native(self) -> bool:
        """QEMU moves the VM by itself."""
        return self in (Mode.QEMU, Mode.QEMU_PREEMPT)

    @property
    def fault_source(self) -> str:
        """What `farfault run` is told; empty for QEMU's own."""
        return {Mode.NOWAIT: "stock-nowait", Mode.BLOCKING: "blocking"}.get(self, "")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Circumstances that all modes meet alike.

    Attributes:
        guest: how it uses its memory.
        ram_bytes, vcpus: of the VM.
        rtt_ms: round-trip time that the network adds.
        rate_bytes_per_s: of the network, each direction; 0: no limit.
    """

    guest: GuestKind = GuestKind.RANDOM
    ram_bytes: int = 1 << 30
    vcpus: int = 1
    rtt_ms: float = 0.0
    rate_bytes_per_s: int = 0

    @property
    def has_network(self) -> bool:
        """Something stands between the hosts; else they speak over loopback."""
        return bool(self.rtt_ms or self.rate_bytes_per_s)

    @property
    def title(self) -> str:
        vcpus = f"{self.vcpus} vCPU" + ("s" if self.vcpus > 1 else "")
        rate = f", {self.rate_bytes_per_s / 1e6:g} MB/s" if self.rate_bytes_per_s else ""
        return f"{self.guest.value}, {self.ram_bytes >> 20} MiB, {vcpus}, RTT {self.rtt_ms:g} ms{rate}"


@dataclass(frozen=True, slots=True)
class Axes:
    """The values to be compared along each axis; the first of each together are the reference."""

    guests: Sequence[GuestKind]
    ram_bytes: Sequence[int]
    vcpus: Sequence[int]
    rtt_ms: Sequence[float]
    rates_bytes_per_s: Sequence[int]

    @property
    def reference(self) -> Scenario:
        return Scenario(self.guests[0], self.ram_bytes[0], self.vcpus[0], self.rtt_ms[0], self.rates_bytes_per_s[0])

    def star(self) -> list[Scenario]:
        """The reference, then scenarios that differ from it in one axis."""
        first = self.reference
        return [
            first,
            *(replace(first, guest=guest) for guest in self.guests[1:]),
            *(replace(first, ram_bytes=size) for size in self.ram_bytes[1:]),
            *(replace(first, vcpus=count) for count in self.vcpus[1:]),
            *(replace(first, rtt_ms=rtt) for rtt in self.rtt_ms[1:]),
            *(replace(first, rate_bytes_per_s=rate) for rate in self.rates_bytes_per_s[1:]),
        ]

    def every(self) -> list[Scenario]:
        """Every combination, the reference first."""
        axes = (self.guests, self.ram_bytes, self.vcpus, self.rtt_ms, self.rates_bytes_per_s)
        return [Scenario(*values) for values in product(*axes)]


def order_of_modes(modes: Sequence[Mode], run: int) -> list[Mode]:
    """The modes in the order of one run: each comes first in turn, so that none always follows the same one."""
    start = run % len(modes)
    return [*modes[start:], *modes[:start]]
