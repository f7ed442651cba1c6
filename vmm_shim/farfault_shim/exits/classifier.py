"""What a KVM_RUN result means: one classifier for every VMM. No I/O, no clock.

KVM cannot tell a NOWAIT -EFAULT from any other, so the decision comes from page states, never from the
exit alone. The rows, first match wins (DESIGN, "what a KVM_RUN exit means"):

=====================================================  =================================
result                                                 decision
=====================================================  =================================
-1 EINTR, EAGAIN, EHWPOISON, any other errno           PassOn
0, not an MMIO exit                                    PassOn
0, MMIO, gpa in no slot                                PassOn
0, MMIO, in RAM, a page absent                         Fetch, then COMPLETE
0, MMIO, in RAM, all present                           Complete
-1 EFAULT, private flag, or no slot, size 0, past end  PassOn
-1 EFAULT, address known, a page absent                Fetch, then RETRY
-1 EFAULT, address known, all present                  Retry with populate; bounded, Escalate
-1 EFAULT, no address                                  Retry; bounded, Escalate
=====================================================  =================================
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple, Protocol

from farfault_shim.attach.wire import AddressSource, Report, Slot
from farfault_shim.layout import FlatOffset, Gpa, Layout, PageIndex, PageRun

KVM_EXIT_UNTOUCHED: Final = 0
"""KVM_EXIT_UNKNOWN; the shim clears `exit_reason` before KVM_RUN, so 0 says that KVM wrote none."""
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_MEMORY_FAULT: Final = 39
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3

RETRIES_MAX: Final = 64
"""Restarts of one vCPU at one address without a fetch in between, before its exit is escalated."""
RETRY_MEMORY_NS: Final = 1_000_000_000
"""An address that did not fail for this long starts anew: a page that is reclaimed now and then is no loop."""
RETRY_ADDRESSES_MAX: Final = 16
"""Addresses that one vCPU may fail at in turn; one instruction touches fewer."""
FAULT_PAGES_MAX: Final = 512
"""Pages of one annotated exit (2 MiB of 4 KiB pages); a longer range is not a page fault."""
BASE_PAGE_BYTES: Final = 4096
NO_ADDRESS: Final = -1

_NONE, _KVM_RUN, _MMIO = AddressSource.NONE, AddressSource.KVM_RUN, AddressSource.MMIO  # looking a member up takes time


class Then(Enum):
    """What follows a fetch."""

    RETRY = "retry"
    COMPLETE_MMIO = "complete the access"


class Fetch(NamedTuple):
    """Fetch these absent pages at vCPU priority, install them, then restart the vCPU."""

    pages: tuple[PageRun, ...]
    then: Then


class Retry(NamedTuple):
    """Restart KVM_RUN now; `size_bytes` > 0: first make ``[gpa, gpa + size_bytes)`` present."""

    gpa: Gpa
    size_bytes: int


class Complete(NamedTuple):
    """Finish the MMIO access in RAM now, then restart."""


class PassOn(NamedTuple):
    """Not ours: the VMM gets its result untouched."""

    reason: str


class Escalate(NamedTuple):
    """The VMM gets the -EFAULT that it would have had; the line goes to the log."""

    log_line: str


Decision = Fetch | Retry | Complete | PassOn | Escalate


class PageStates(Protocol):
    """What the classifier asks of the pager's page map."""

    def is_present(self, page: int) -> bool:
        """Installed in guest memory."""


class SlotTable:
    """Memslots, searched by guest physical address.

    Args:
        slots: of one VM; they do not overlap (KVM refuses that).
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = sorted(slots, key=lambda slot: slot.gpa)
        self._starts = [slot.gpa for slot in self._slots]

    def slot_of(self, gpa: int) -> Slot | None:
        """The slot that holds an address."""
        index = bisect_right(self._starts, gpa) - 1
        if index < 0:
            return None
        slot = self._slots[index]
        return slot if gpa < slot.gpa + slot.size_bytes else None

    def offset_of(self, gpa: int) -> FlatOffset | None:
        """The flat offset of an address; None where it lies in no slot."""
        slot = self.slot_of(gpa)
        return None if slot is None else FlatOffset(slot.offset_bytes + gpa - slot.gpa)


@dataclass(slots=True)
class _Progress:
    """Restarts at one address without a fetch."""

    attempts: int
    last_ns: int


class ExitClassifier:
    """Turns raw exits into decisions.

    Args:
        layout: guest memory.
        slots: returns the memslots of this moment; asked for each exit that has an address.
        pages: the pager's page states.
        retries_max: see `RETRIES_MAX`.
    """

    def __init__(
        self,
        layout: Layout,
        slots: Callable[[], SlotTable],
        pages: PageStates,
        retries_max: int = RETRIES_MAX,
    ) -> None:
        self._layout = layout
        self._slots = slots
        self._pages = pages
        self._retries_max = retries_max
        self._progress: dict[int, dict[int, _Progress]] = {}

    def classify(self, raw: Report) -> Decision:
        """Decides one exit, a report of kind EXIT. Keeps only the count of fruitless restarts by vCPU."""
        if raw.ret == 0:
            return self._mmio(raw) if raw.exit_reason == KVM_EXIT_MMIO else PassOn("an exit of the VMM's")
        if raw.err != errno.EFAULT:
            return PassOn(errno.errorcode.get(raw.err, f"errno {raw.err}"))
        return self._fault(raw) if _has_address(raw) else self._retry(raw, None)

    def _mmio(self, raw: Report) -> Decision:
        slots = self._slots()
        slot = slots.slot_of(raw.gpa)
        if slot is None or not 1 <= raw.mmio_len <= 8:
            return PassOn("device memory")
        if raw.gpa + raw.mmio_len > slot.gpa + slot.size_bytes:
            return PassOn("an access that leaves its slot")
        absent = self._absent(slot, raw.gpa, raw.mmio_len)
        if absent is None:
            return PassOn("a slot outside of the memory that was handed over")
        self._progress.pop(raw.vcpu, None)
        return Fetch(absent, Then.COMPLETE_MMIO) if absent else Complete()

    def _fault(self, raw: Report) -> Decision:
        if raw.address_source is _KVM_RUN:
            if raw.flags & KVM_MEMORY_EXIT_FLAG_PRIVATE:
                return PassOn("a private-memory fault")
            if raw.size == 0:
                return PassOn("a fault of size 0")
            size_bytes = raw.size
        else:
            size_bytes = 1
        slot = self._slots().slot_of(raw.gpa)
        if slot is None:
            return PassOn("an address in no memslot")
        if raw.gpa + size_bytes > slot.gpa + slot.size_bytes:
            return PassOn("a range past its memslot")
        if size_bytes > FAULT_PAGES_MAX * BASE_PAGE_BYTES and size_bytes > self._page_size(slot, raw.gpa):
            return PassOn("a range longer than a page fault can be")
        absent = self._absent(slot, raw.gpa, size_bytes)
        if absent is None:
            return PassOn("a slot outside of the memory that was handed over")
        if absent:
            self._progress.pop(raw.vcpu, None)
            return Fetch(absent, Then.RETRY)
        return self._retry(raw, slot)

    def _retry(self, raw: Report, slot: Slot | None) -> Decision:
        """Bounded restarts: a lost race or a page not yet mapped, or a bare EFAULT that nothing explains."""
        address = NO_ADDRESS if slot is None else raw.gpa & ~(BASE_PAGE_BYTES - 1)
        addresses = self._progress.setdefault(raw.vcpu, {})
        progress = addresses.pop(address, None)
        if progress is None or raw.exit_ns - progress.last_ns > RETRY_MEMORY_NS:
            progress = _Progress(0, 0)
        progress.attempts += 1
        progress.last_ns = raw.exit_ns
        if progress.attempts > self._retries_max:
            return Escalate(_log_line(raw, slot, self._retries_max))
        addresses[address] = progress
        if len(addresses) > RETRY_ADDRESSES_MAX:
            del addresses[next(iter(addresses))]
        if slot is None:
            return Retry(Gpa(0), 0)
        return Retry(Gpa(address), BASE_PAGE_BYTES)

    def _absent(self, slot: Slot, gpa: int, size_bytes: int) -> tuple[PageRun, ...] | None:
        """The absent pages of a range; None where the slot is not part of the layout."""
        try:
            pages = self._layout.pages_of_bytes(slot.offset_bytes + gpa - slot.gpa, size_bytes)
        except IndexError:
            return None
        if pages.count == 1:
            return () if self._pages.is_present(pages.first) else (pages,)
        absent: list[PageRun] = []
        for page in range(pages.first, pages.end):
            if self._pages.is_present(page):
                continue
            if absent and absent[-1].end == page:
                absent[-1] = PageRun(absent[-1].first, absent[-1].count + 1)
            else:
                absent.append(PageRun(PageIndex(page), 1))
        return tuple(absent)

    def _page_size(self, slot: Slot, gpa: int) -> int:
        try:
            return self._layout.region_at(slot.offset_bytes + gpa - slot.gpa).page_size_bytes
        except IndexError:
            return BASE_PAGE_BYTES


def _has_address(raw: Report) -> bool:
    """False where `gpa` cannot be trusted: the union holds garbage unless `exit_reason` says what it is."""
    source = raw.address_source
    if source is _KVM_RUN:
        return raw.exit_reason == KVM_EXIT_MEMORY_FAULT
    return source is not _NONE and source is not _MMIO


def _log_line(raw: Report, slot: Slot | None, attempts: int) -> str:
    where = (
        "address unknown" if slot is None else f"gpa {raw.gpa:#x}, slot {slot.id} [{slot.gpa:#x}+{slot.size_bytes:#x}]"
    )
    state = "unknown" if slot is None else "present"
    return (
        f"vCPU {raw.vcpu}: KVM_RUN keeps failing with EFAULT: {where}, rip {raw.rip:#x}, page {state}, "
        f"exit_reason {raw.exit_reason}, {attempts} attempts; the VMM gets the error"
    )
