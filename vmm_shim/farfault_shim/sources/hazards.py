"""Pages that KVM itself touches: what an absent one does, by fault source and paging. No I/O.

Under a SIGBUS userfaultfd KVM's own accesses fail instead of waiting, and not as an exit of KVM_RUN.
docs/fault-sources.md has the table and its reasons.
"""

from __future__ import annotations

from typing import NamedTuple

from farfault_shim.attach.wire import FaultSource
from farfault_shim.sources.facts import Paging


class Hazard(NamedTuple):
    """One kind of page.

    Attributes:
        pages: which.
        closed: the guest cannot notice.
        detail: why, or what happens.
    """

    pages: str
    closed: bool
    detail: str


def hazards(source: FaultSource, paging: Paging) -> tuple[Hazard, ...]:
    """What holds for a fault source on a host with such paging."""
    if source is not FaultSource.STOCK_NOWAIT:
        waits = "KVM waits for the page like any thread"
        if source is FaultSource.KERNEL_NOWAIT:
            waits = "KVM's own accesses wait on the blocking userfaultfd"
        if source is FaultSource.SIMULATED:
            waits = "the simulated KVM asks for the page"
        return tuple(
            Hazard(pages, True, waits)
            for pages in ("para-virtual pages", "guest page tables", "emulated accesses", "VMM threads, vhost")
        )
    tables = Hazard("guest page tables", True, "the hardware walk exits first: tables arrive like any page")
    if paging is not Paging.TWO_DIMENSIONAL:
        tables = Hazard(
            "guest page tables",
            False,
            "an absent table is a page fault inside the guest; only tables known at the start are installed",
        )
    return (
        Hazard("para-virtual pages", True, "named by MSRs, installed before each vCPU's first KVM_RUN"),
        tables,
        Hazard("emulated accesses", True, "come as MMIO inside RAM and are completed there"),
        Hazard("VMM threads, vhost", True, "use the VMM's own mapping, which blocks"),
    )
