"""What passes between the fault engine and its driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from farfault_shim.layout import PageIndex, PageRun

from farfault_client.engine.states import Priority


class Fetch(NamedTuple):
    """A request to send: runs of pages, none of which crosses a region border."""

    request_id: int
    priority: Priority
    runs: tuple[PageRun, ...]
    size_bytes: int


class ExtentResult(Enum):
    """What an answer says about a run of pages."""

    DATA = "data"
    ZERO = "zero"
    REFUSED = "refused"


class Extent(NamedTuple):
    """A run of pages of an answer."""

    run: PageRun
    result: ExtentResult


class Install(NamedTuple):
    """An order to the driver: put these pages into guest memory.

    Attributes:
        run: pages of one region.
        data_offset: where their bytes begin in the answer's data; -1: they are zero.
    """

    run: PageRun
    data_offset: int


class FaultAnswer(NamedTuple):
    """What a fault means for the driver.

    Attributes:
        ready: every page is present: restart (or wake) the thread at once. Else it waits.
        zero_pages: removed pages among them: the driver installs zero pages now, then says `installed`.
    """

    ready: bool
    zero_pages: tuple[PageIndex, ...] = ()


@dataclass(slots=True)
class EngineStats:
    """Counters since the start; pages and faults, not bytes.

    Attributes:
        demand_faults: faults of vCPUs and of the VMM's threads.
        faults_on_flight: of pages that were asked for already.
        faults_on_present: of pages that were there.
        installed_pages: put in place by us, each counted once.
        zero_pages: that the source called zero, holes included.
        existed_pages: that somebody else had installed.
        removed_pages: that the guest gave back.
        refused_pages: that the source refused to send.
        clipped_pages: that arrived and were not wanted any more.
        lost_pages: whose request was lost, refused or answered in part.
        prefetched_pages: asked for as neighbours.
        requests_by_priority: requests made.
    """

    demand_faults: int = 0
    faults_of_vcpus: int = 0
    faults_of_vmm: int = 0
    faults_on_flight: int = 0
    faults_on_present: int = 0
    installed_pages: int = 0
    zero_pages: int = 0
    existed_pages: int = 0
    removed_pages: int = 0
    refused_pages: int = 0
    clipped_pages: int = 0
    lost_pages: int = 0
    prefetched_pages: int = 0
    requests_by_priority: dict[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 0))
