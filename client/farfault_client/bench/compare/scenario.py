"""What is compared, and under which circumstances. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product
from typing import Any

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


class Link(Enum):
    """What joins the hosts."""

    LOOPBACK = "loopback"
    """Both sides in one network namespace."""
    NAMESPACES = "namespaces"
    """A network namespace for each side, and a veth pair."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Circumstances that all modes meet alike.

    Attributes:
        guest: how it uses its memory.
        ram_bytes, vcpus: of the VM.
        rtt_ms: round-trip time that the network adds.
        rate_bytes_per_s: of the network, each direction; 0: no limit.
        link: what the hosts are joined by.
    """

    guest: GuestKind = GuestKind.RANDOM
    ram_bytes: int = 1 << 30
    vcpus: int = 1
    rtt_ms: float = 0.0
    rate_bytes_per_s: int = 0
    link: Link = Link.LOOPBACK

    @property
    def has_proxy(self) -> bool:
        """Something on the link delays bytes; else it is as fast as the kernel."""
        return bool(self.rtt_ms or self.rate_bytes_per_s)

    @property
    def title(self) -> str:
        vcpus = f"{self.vcpus} vCPU" + ("s" if self.vcpus > 1 else "")
        rate = f", {self.rate_bytes_per_s / 1e6:g} MB/s" if self.rate_bytes_per_s else ""
        link = f", {self.link.value}" if self.link is not Link.LOOPBACK else ""
        return f"{self.guest.value}, {self.ram_bytes >> 20} MiB, {vcpus}, RTT {self.rtt_ms:g} ms{rate}{link}"


@dataclass(frozen=True, slots=True)
class Axes:
    """The values to be compared along each axis; the first of each together are the reference."""

    guests: Sequence[GuestKind]
    ram_bytes: Sequence[int]
    vcpus: Sequence[int]
    rtt_ms: Sequence[float]
    rates_bytes_per_s: Sequence[int]
    links: Sequence[Link] = (Link.LOOPBACK,)

    @property
    def reference(self) -> Scenario:
        return Scenario(*(values[0] for values in self._all))

    def star(self) -> list[Scenario]:
        """The reference, then scenarios that differ from it in one axis; other networks on the last link."""
        first, link = self.reference, self.links[-1]
        return [
            first,
            *(replace(first, guest=guest) for guest in self.guests[1:]),
            *(replace(first, ram_bytes=size) for size in self.ram_bytes[1:]),
            *(replace(first, vcpus=count) for count in self.vcpus[1:]),
            *(replace(first, link=each) for each in self.links[1:]),
            *(replace(first, rtt_ms=rtt, link=link) for rtt in self.rtt_ms[1:]),
            *(replace(first, rate_bytes_per_s=rate, link=link) for rate in self.rates_bytes_per_s[1:]),
        ]

    def every(self) -> list[Scenario]:
        """Every combination, the reference first."""
        return [Scenario(*values) for values in product(*self._all)]

    @property
    def _all(self) -> tuple[Sequence[Any], ...]:
        """In the order of the fields of `Scenario`."""
        return self.guests, self.ram_bytes, self.vcpus, self.rtt_ms, self.rates_bytes_per_s, self.links


def order_of_modes(modes: Sequence[Mode], run: int) -> list[Mode]:
    """The modes in the order of one run: each comes first in turn, so that none always follows the same one."""
    start = run % len(modes)
    return [*modes[start:], *modes[:start]]
