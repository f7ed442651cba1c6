"""The destination: a kernel that knows which pages are there, and vCPUs that touch them and check every byte."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from farfault_shim.attach.wire import AddressSource, Report, ReportKind, Slot
from farfault_shim.exits.classifier import KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO
from farfault_shim.layout import FlatOffset, Gpa, Layout, PageIndex, PageRun

if TYPE_CHECKING:
    from sim_clock import Clock

PAGE = 4096
ZEROS = bytes(PAGE)
HIGH_GPA = 1 << 32


class Handler(Protocol):
    """Who answers the faults; a receiver, while there is one."""

    def vcpu_exit(self, raw: Report) -> None: ...
    def kernel_fault(self, page: int, is_vcpu: bool) -> None: ...
    def kicked(self, vcpu: int) -> None: ...
    def events_wait(self) -> None: ...


@dataclass
class Kernel:
    """Guest memory as the kernel has it. `pages` has an entry for each page that is present."""

    page_count: int
    pages: dict[int, bytes] = field(default_factory=dict)
    removals: list[PageRun] = field(default_factory=list)
    """Events that were not read yet; copies fail with EAGAIN meanwhile."""
    removed: set[int] = field(default_factory=set)
    """Pages that were given back and not touched since."""
    installs_by_page: dict[int, int] = field(default_factory=dict)
    others_installed: set[int] = field(default_factory=set)

    def copy(self, page: int, data: bytes) -> int:
        """UFFDIO_COPY or UFFDIO_ZEROPAGE of one page: an errno, 0 for done."""
        if self.removals:
            return errno.EAGAIN
        assert len(data) == PAGE, "a page of a wrong length was installed"
        if page in self.pages:
            return errno.EEXIST
        assert page not in self.removed or data == ZEROS, f"page {page}: repopulated after it was removed"
        self.pages[page] = data
        self.removed.discard(page)
        self.installs_by_page[page] = self.installs_by_page.get(page, 0) + 1
        return 0

    def read_events(self) -> list[PageRun]:
        """The guest's thread goes on when its event is read, and the pages are gone."""
        events, self.removals = self.removals, []
        for run in events:
            for page in range(run.first, run.end):
                self.pages.pop(page, None)
                self.removed.add(page)
                self.installs_by_page.pop(page, None)
        return events


@dataclass
class Vcpu:
    """Touches pages in some order. A page may be written, so that a copy that came late would show."""

    number: int
    todo: list[int]
    is_blocking: bool
    waits: bool = False
    page: int = -1
    since: float = 0.0


def orders(kind: str, pages: int, touches: int, rng: random.Random) -> Iterator[int]:
    """The pages that a guest touches, in order."""
    start, stride = rng.randrange(pages), rng.choice((2, 3, 5))
    for step in range(touches):
        match kind:
            case "sequential":
                yield (start + step) % pages
            case "backwards":
                yield (start - step) % pages
            case "strided":
                yield (start + step * stride) % pages
            case _:
                yield rng.randrange(pages)


class Guest:
    """vCPUs, a VMM thread and a balloon on one memory."""

    PATTERNS = ("sequential", "backwards", "strided", "random")

    def __init__(self, clock: Clock, rng: random.Random, layout: Layout, source: list[bytes]) -> None:
        self.clock, self.rng, self.layout = clock, rng, layout
        self.kernel = Kernel(layout.page_count)
        self.expected = list(source)
        half = layout.page_count // 2 * PAGE
        self.slots = [
            Slot(0, 0, Gpa(0), half, FlatOffset(0)),
            Slot(1, 0, Gpa(HIGH_GPA), layout.size_bytes - half, FlatOffset(half)),
        ]
        self.handler: Handler | None = None
        pages = layout.page_count
        self.vcpus = [
            Vcpu(
                number,
                list(orders(rng.choice(self.PATTERNS), pages, rng.randint(1, pages), rng))[::-1],
                number == 0 or rng.random() < 0.3,  # vCPU 0 is the VMM's thread
            )
            for number in range(rng.randint(2, 5))
        ]
        self.longest_wait_s = 0.0

    def start(self) -> None:
        for vcpu in self.vcpus:
            self.clock.after(self.rng.random() * 0.01, lambda vcpu=vcpu: self._step(vcpu))  # type: ignore[misc]
        for _ in range(self.rng.choice((0, 0, 1, 3, 10))):
            self.clock.after(self.rng.random() * 0.2, self._balloon)

    @property
    def done(self) -> bool:
        return not any(vcpu.todo or vcpu.waits for vcpu in self.vcpus)

    # ---- a vCPU ----------------------------------------------------------------------------------

    def _step(self, vcpu: Vcpu) -> None:
        if not vcpu.todo:
            return
        vcpu.page = vcpu.todo.pop()
        vcpu.since = self.clock.now
        self.touch(vcpu)

    def touch(self, vcpu: Vcpu) -> None:
        """One attempt: a hit is checked, a miss is reported."""
        content = self.kernel.pages.get(vcpu.page)
        if content is None:
            vcpu.waits = True
            self._miss(vcpu)
            return
        vcpu.waits = False
        self.longest_wait_s = max(self.longest_wait_s, self.clock.now - vcpu.since)
        assert content == self.expected[vcpu.page], f"vCPU {vcpu.number} reads wrong bytes in page {vcpu.page}"
        if self.rng.random() < 0.3:
            written = self.rng.randbytes(8) * (PAGE // 8)
            self.kernel.pages[vcpu.page] = self.expected[vcpu.page] = written
        self.clock.after(self.rng.random() * 0.002, lambda: self._step(vcpu))

    def _miss(self, vcpu: Vcpu) -> None:
        if self.handler is None:
            return  # it waits: the next handler is told
        if vcpu.is_blocking:
            self.handler.kernel_fault(vcpu.page, vcpu.number != 0)
            return
        self.handler.vcpu_exit(self._exit(vcpu))
        if vcpu.waits and self.rng.random() < 0.03:
            self.clock.after(self.rng.random() * 0.01, lambda: self._kick(vcpu))

    def _exit(self, vcpu: Vcpu) -> Report:
        """What KVM_RUN returns: annotated, sampled, emulated, or bare with garbage in the union."""
        offset = vcpu.page * PAGE
        slot = self.slots[0] if offset < self.slots[0].size_bytes else self.slots[1]
        gpa = slot.gpa + offset - slot.offset_bytes
        anywhere = gpa + self.rng.randrange(PAGE)
        ended_ns = int(self.clock.now * 1e9)
        raw = Report(ReportKind.EXIT, vcpu.number, 0, ret=-1, err=errno.EFAULT, gpa=anywhere, exit_ns=ended_ns)
        match self.rng.randrange(10):
            case 0:
                return raw._replace(gpa=self.rng.getrandbits(64), size=self.rng.getrandbits(64))
            case 1:
                return raw._replace(
                    ret=0, err=0, exit_reason=KVM_EXIT_MMIO, gpa=gpa, mmio_len=8, address_source=AddressSource.MMIO
                )
            case 2 | 3 | 4:
                return raw._replace(
                    exit_reason=KVM_EXIT_MEMORY_FAULT, gpa=gpa, size=PAGE, address_source=AddressSource.KVM_RUN
                )
            case 5 | 6:
                return raw._replace(address_source=AddressSource.TRACEPOINT_GVA)
            case _:
                return raw._replace(address_source=AddressSource.TRACEPOINT_GPA)

    def _kick(self, vcpu: Vcpu) -> None:
        if vcpu.waits and self.handler is not None:
            self.handler.kicked(vcpu.number)
            self.clock.after(self.rng.random() * 0.002, lambda: self.touch(vcpu) if vcpu.waits else None)

    def restart_vcpu(self, number: int) -> None:
        """The verdict: KVM_RUN again."""
        vcpu = self.vcpus[number]
        if vcpu.waits:
            self.touch(vcpu)

    def wake_page(self, page: int) -> None:
        """Threads that sleep in the kernel on a page look again."""
        for vcpu in self.vcpus:
            if vcpu.waits and vcpu.is_blocking and vcpu.page == page:
                self.touch(vcpu)

    def attach(self, handler: Handler | None) -> None:
        """A receiver came (waiting threads report again), or went."""
        self.handler = handler
        if handler is not None:
            for vcpu in self.vcpus:
                if vcpu.waits:
                    self.touch(vcpu)

    # ---- the rest ---------------------------------------------------------------------------------

    def _balloon(self) -> None:
        """The guest gives pages back, often some that a vCPU is about to read; they are zero from now on."""
        waited_for = [vcpu.page for vcpu in self.vcpus if vcpu.waits]
        first = self.rng.randrange(self.layout.page_count)
        if waited_for and self.rng.random() < 0.7:
            first = self.rng.choice(waited_for)
        run = PageRun(PageIndex(first), self.rng.randint(1, min(6, self.layout.page_count - first)))
        for page in range(run.first, run.end):
            self.expected[page] = ZEROS
        # Until the event is read the thread that gives the pages back stands still, and so do the others here.
        for page in range(run.first, run.end):
            self.kernel.pages.pop(page, None)
        self.kernel.removals.append(run)
        if self.handler is not None:
            self.handler.events_wait()

    def check_at_end(self) -> None:
        """Memory as the guest left it; pages that were given back are not there unless somebody touched them."""
        for page, content in self.kernel.pages.items():
            assert content == self.expected[page], f"page {page} has wrong bytes at the end"
        for page in range(self.layout.page_count):
            if page not in self.kernel.pages:
                assert self.expected[page] == ZEROS, f"page {page} is a hole and should have bytes"
