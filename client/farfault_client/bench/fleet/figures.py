"""What each VM of a fleet got, and how fair that was. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

from farfault_client.bench.spread import spread_of


@dataclass(frozen=True, slots=True)
class VmFigures:
    """One VM's move.

    Attributes:
        vm: its number, from 0.
        pages: of its guest.
        switchover_s: from the moment at which all were told to move until it ran on the destination.
        downtime_ms: of it, what the guest stood still.
        postcopy_s: from then until its last page was there.
        demand_faults: pages that its vCPUs waited for.
        mean_fault_us, p99_fault_us: what they waited; None without any.
        longest_pause_s: the longest time of `postcopy_s` in which no page came.
        verification_errors: wrong words or pages, as the guest and a check from outside say.
    """

    vm: int
    pages: int
    switchover_s: float
    downtime_ms: float
    postcopy_s: float
    demand_faults: int
    mean_fault_us: float | None
    p99_fault_us: float | None
    longest_pause_s: float
    verification_errors: int

    @property
    def pages_per_s(self) -> float:
        return self.pages / self.postcopy_s


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """All of them.

    Attributes:
        vms: in the order of their numbers; at least one.
        looked_every_s: the longest time between two looks at who got pages; pauses are known that exactly.
    """

    vms: Sequence[VmFigures]
    looked_every_s: float

    @property
    def fairness(self) -> float:
        """Jain's index of pages a second."""
        return jain_index(vm.pages_per_s for vm in self.vms)

    @property
    def slowest(self) -> VmFigures:
        return max(self.vms, key=lambda vm: vm.postcopy_s)

    @property
    def slowest_over_median(self) -> float:
        """Post-copy time of the slowest VM over the median VM's."""
        spread = spread_of(vm.postcopy_s for vm in self.vms)
        assert spread is not None
        return spread.high / spread.median

    @property
    def total_s(self) -> float:
        """From the moment at which all were told to move until the last page of the last one was there."""
        return max(vm.switchover_s + vm.postcopy_s for vm in self.vms)

    @property
    def verification_errors(self) -> int:
        return sum(vm.verification_errors for vm in self.vms)

    def to_json(self) -> dict[str, Any]:
        """Figures of the fleet, and of each VM as ``vms``."""
        return {
            "fairness": self.fairness,
            "slowest_vm": self.slowest.vm,
            "slowest_over_median": self.slowest_over_median,
            "total_s": self.total_s,
            "looked_every_s": self.looked_every_s,
            "verification_errors": self.verification_errors,
            "spreads": {
                metric.name: spread._asdict() if (spread := spread_of(map(metric.value, self.vms))) else None
                for metric in METRICS
            },
            "vms": [{**asdict(vm), "pages_per_s": vm.pages_per_s} for vm in self.vms],
        }


def jain_index(rates: Iterable[float]) -> float:
    """Jain's fairness index: (sum x)^2 / (n * sum x^2). 1: all get the same; 1/n: one gets everything.

    Raises:
        ValueError: nobody got anything.
    """
    known = list(rates)
    squares = sum(rate * rate for rate in known)
    if not squares:
        raise ValueError("no rate above zero")
    return sum(known) ** 2 / (len(known) * squares)


def longest_pause_s(arrivals: Iterable[float], begin: float, end: float) -> float:
    """The longest time between `begin` and `end` in which nothing arrived.

    Args:
        arrivals: moments at which something had come, in any order; those outside count nothing.
    """
    moments = [begin, *sorted(moment for moment in arrivals if begin < moment < end), max(begin, end)]
    return max(after - before for before, after in pairwise(moments))


class Metric(NamedTuple):
    """A row of the fleet's table, and a column of the VMs'.

    Attributes:
        name: in JSON.
        title: with its unit.
        value: of a VM, in the unit of the name.
        scale: from there to the unit of the title.
        decimals: that are shown.
    """

    name: str
    title: str
    value: Callable[[VmFigures], float | None]
    scale: float = 1.0
    decimals: int = 0

    def text(self, value: float | None) -> str:
        return "-" if value is None else f"{value * self.scale:,.{self.decimals}f}"


METRICS: Final = (
    Metric("switchover_s", "told to move until it runs (s)", lambda vm: vm.switchover_s, decimals=2),
    Metric("downtime_ms", "downtime (ms)", lambda vm: vm.downtime_ms),
    Metric("postcopy_s", "post-copy (s)", lambda vm: vm.postcopy_s, decimals=2),
    Metric("pages_per_s", "pages a second", lambda vm: vm.pages_per_s),
    Metric("demand_faults", "demand faults", lambda vm: vm.demand_faults),
    Metric("mean_fault_us", "demand fault, mean (ms)", lambda vm: vm.mean_fault_us, 1e-3, 1),
    Metric("p99_fault_us", "demand fault, p99 (ms)", lambda vm: vm.p99_fault_us, 1e-3, 1),
    Metric("longest_pause_s", "longest time without a page (ms)", lambda vm: vm.longest_pause_s, 1e3),
    Metric("verification_errors", "verification errors", lambda vm: vm.verification_errors),
)


def fleet_rows(fleet: FleetFigures) -> list[list[str]]:
    """A row for each metric: title, median, least, most, and the slowest VM's."""
    rows = []
    for metric in METRICS:
        spread = spread_of(map(metric.value, fleet.vms))
        values = (spread.median, spread.low, spread.high) if spread else (None, None, None)
        rows.append([metric.title, *map(metric.text, values), metric.text(metric.value(fleet.slowest))])
    return rows


def vm_rows(fleet: FleetFigures) -> list[list[str]]:
    """A row for each VM: its number, then each metric."""
    return [[str(vm.vm), *(metric.text(metric.value(vm)) for metric in METRICS)] for vm in fleet.vms]


def verdict_lines(fleet: FleetFigures) -> list[str]:
    """The fleet's own figures, in words."""
    return [
        f"fairness of pages a second (Jain; 1: all alike, {1 / len(fleet.vms):.3f}: one has all): {fleet.fairness:.3f}",
        f"slowest VM over the median, post-copy: {fleet.slowest_over_median:.2f}",
        f"all VMs moved within: {fleet.total_s:.1f} s",
        f"longest time between two looks at who got pages: {fleet.looked_every_s * 1e3:,.0f} ms",
    ]


FLEET_HEADINGS: Final = ["", "median", "least", "most", "slowest VM"]
