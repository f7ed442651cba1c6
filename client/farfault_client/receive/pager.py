"""The pager of one VM: carries faults from an attached VMM to the engine, and pages from the session into memory.

Everything here runs on the event loop and never awaits between reading the engine's state and changing
it, so that no lock is needed. The decisions are the engine's and the classifier's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from farfault.v1 import pages_pb2 as pb
from farfault_shim.attach.vmm import AttachedVmm, VcpuChannel
from farfault_shim.attach.wire import AddressSource, Report, ReportKind, Slot, Verdict, VerdictKind
from farfault_shim.exits.classifier import (
    Complete,
    Escalate,
    ExitClassifier,
    PassOn,
    Retry,
    SlotTable,
    Then,
)
from farfault_shim.exits.classifier import Fetch as FetchDecision
from farfault_shim.exits.page_tables import TABLE_BYTES, PageTableWalk
from farfault_shim.install.installer import FileInstaller, Installer, InstallError, UffdInstaller
from farfault_shim.layout import Gpa, Layout, PageIndex, PageRun
from farfault_shim.uffd.userfaultfd import Fault, Removed

from farfault_client.bulk.messages import Target
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.engine import EngineConfig, FaultEngine, PageState, Priority, Waiter
from farfault_client.engine.page_map import PageMap
from farfault_client.metrics.slow_faults import SlowFaults
from farfault_client.receive.digest import RamDigest
from farfault_client.receive.fault_times import FaultResult, FaultTimes, Sent, Trip
from farfault_client.receive.installing import Installing
from farfault_client.receive.lone_faults import LoneFaults
from farfault_client.receive.working_set import WorkingSet
from farfault_client.session.answers import Answer, LonePage, Placed, request_of
from farfault_client.session.lane import Lane
from farfault_client.session.session import Session

logger = logging.getLogger(__name__)

EVENTS_PER_WAKEUP_MAX = 1024
"""userfaultfd events taken in one go before other work gets its turn."""
BACKGROUND_RETRY_S = 0.001
"""The background lane asks the engine again after this long when its window or cap was closed."""
TIDS_AGE_MAX_S = 0.1
"""A thread that is no known vCPU's is looked up again after this long."""
REFUSAL_PAUSE_S = 0.05
"""A refused range is asked for again after this long, so that a refusing server is not hammered."""
REFUSALS_TOLD = 20
"""Refusing answers in a row after which the status says so: about a second."""


class VcpuKey(NamedTuple):
    """Engine key of a vCPU that ended KVM_RUN and waits for a verdict. A tuple: its hash costs next to nothing."""

    vcpu: int
    kind: str = "vcpu"

    def __str__(self) -> str:
        return f"vCPU {self.vcpu}"


class PageKey(NamedTuple):
    """Engine key of the threads that sleep in the kernel on one page of a blocking userfaultfd."""

    page: PageIndex
    kind: str = "page"

    def __str__(self) -> str:
        return "a thread in the kernel"


class Pending(NamedTuple):
    """A verdict that a vCPU waits for."""

    channel: VcpuChannel
    seq: int
    verdict: VerdictKind


# Bound once: looking up a member of an enum costs as much as a step of a fault.
_FETCHED, _JOINED = FaultResult.FETCHED, FaultResult.JOINED
_COMPLETE_MMIO, _COMPLETE, _RETRY = Then.COMPLETE_MMIO, VerdictKind.COMPLETE, VerdictKind.RETRY
_VCPU, _VMM = Priority.VCPU, Priority.VMM
_SOURCE_NAMES: Final = tuple(source.name.lower() for source in AddressSource)


@dataclass(slots=True)
class PagerStats:
    """Counters since the start, for status and metrics."""

    faults_by_source: dict[str, int] = field(default_factory=dict)
    times: FaultTimes = field(default_factory=FaultTimes)
    blocked_s_by_vcpu: dict[int, float] = field(default_factory=dict)
    escalations: int = 0
    passed: int = 0
    populated: int = 0
    starts: int = 0
    preinstalled_pages: int = 0
    refusals_in_a_row: int = 0

    def count(self, source: str) -> None:
        self.faults_by_source[source] = self.faults_by_source.get(source, 0) + 1


class Pager:
    """Glue between engine, installer, VMM and session. It is the session's `SessionUser`.

    Args:
        session: an open one; its lease says what guest memory is. The pager starts nothing on it.
        config: of the engine.
        on_removed: told of pages that the guest gives back, before it goes on.
        digest: sums what is installed; None: nobody asked for it.
    """

    def __init__(
        self,
        session: Session,
        config: EngineConfig | None = None,
        on_removed: Callable[[PageRun], None] = lambda run: None,
        digest: RamDigest | None = None,
    ) -> None:
        assert session.lease is not None, "open the session first"
        self.layout = layout = session.lease.layout
        self.session = session
        self._on_removed = on_removed
        self._digest = digest
        self._shared = SharedPages(layout.page_count)
        self.engine = engine = FaultEngine(layout, config, PageMap(layout.page_count, self._shared.states))
        session.share_pages(self._shared, lambda: engine.stats.demand_faults)
        self.stats = PagerStats()
        self.slow_faults = SlowFaults()
        self.working_set = WorkingSet()
        self.finished = asyncio.Event()
        self.stream_background = False
        self.last_refusal = ""
        self._vmm: AttachedVmm | None = None
        self._installer: Installer | None = None
        self._installing: Installing | None = None
        self._lone: LoneFaults | None = None
        self._classifier: ExitClassifier | None = None
        self._pending: dict[int, Pending] = {}
        self._slots: list[Slot] = []
        self._slots_sorted = SlotTable([])
        self._tid_to_vcpu: dict[int, int] = {}
        self._tids_read_at = float("-inf")
        self._presence: list[tuple[set[PageIndex], asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._background_timer: asyncio.TimerHandle | None = None
        self._in_flight: dict[Lane, dict[int, Sent]] = {lane: {} for lane in Lane}  # by request id
        self._trip: Trip | None = None  # of the answer that is being handled
        self._unregistered = False

    # ---- the VMM's side ------------------------------------------------------------------------

    def attach(self, vmm: AttachedVmm) -> None:
        """A VMM (or the same one again, after a restart of either side) handed its memory over.

        Raises:
            ValueError: its memory is not what the page server holds.
        """
        if vmm.layout != self.layout:
            raise ValueError(
                f"the VMM's memory, {layout_text(vmm.layout)}, is not what the page server holds, "
                f"{layout_text(self.layout)}"
            )
        self._vmm = vmm
        self._installer = installer = _installer_of(vmm, self._shared)
        self._installing = Installing(
            vmm.layout, self.engine, installer, self._digest, self._read_events, self._wake_all
        )
        if vmm.uffd is not None:
            self._lone = LoneFaults.of(vmm.layout, vmm.handover, vmm.uffd, vmm.alias_uffd, self._shared)
        self.session.place_into(*_target_of(vmm, with_digest=self._digest is not None))
        self._classifier = ExitClassifier(self.layout, self._slot_table, self.engine.pages)
        self._pending.clear()
        for waiter in self.engine.waiting:
            self.engine.forget(waiter.key)
        if vmm.uffd is not None:
            asyncio.get_running_loop().add_reader(vmm.uffd.fileno(), self._read_events)
        vmm.start(self._reported)

    def detach(self) -> None:
        """The VMM is gone, or its connection is."""
        if self._vmm is not None and self._vmm.uffd is not None:
            asyncio.get_running_loop().remove_reader(self._vmm.uffd.fileno())
        self._vmm = None
        self._installer = self._installing = None
        self._lone = None
        self.session.place_into(None)

    def close(self) -> None:
        """Gives back what the bulk process shared; after the session's `close`."""
        self._shared.close()

    @property
    def attached(self) -> bool:
        return self._vmm is not None

    def restore(self, resident: Iterable[PageRun], removed: Iterable[PageRun]) -> None:
        """After a restart of the receiver: what the kernel says is in memory, and what the guest had given back."""
        for run in resident:
            self._leave_out(run)
            self.engine.present(run)
        for run in removed:
            self._leave_out(run)
            for absent in list(self.engine.pages.runs(*run, PageState.ABSENT)):
                self.engine.removed(absent)

    def unregister(self) -> None:
        """Every page is settled: the kernel takes over, holes read as zero. Wakes whoever still waits."""
        assert self._installer is not None
        assert self._vmm is not None
        if self._vmm.uffd is not None:
            asyncio.get_running_loop().remove_reader(self._vmm.uffd.fileno())
        self._unregistered = True
        self._installer.unregister()

    def _slot_table(self) -> SlotTable:
        """The memslots of this moment, sorted again only where they have changed."""
        assert self._vmm is not None
        slots = self._vmm.slots()
        if slots is not self._slots:
            self._slots, self._slots_sorted = slots, SlotTable(slots)
        return self._slots_sorted

    def _reported(self, channel: VcpuChannel, report: Report) -> None:
        if report.kind is ReportKind.START:
            self._spawn(self._start_vcpu(channel, report))
        else:
            self._exited(channel, report)

    def _exited(self, channel: VcpuChannel, report: Report) -> None:
        assert self._classifier is not None
        if self._unregistered:  # it missed a page while the kernel took over
            retry = VerdictKind.COMPLETE if report.ret == 0 else VerdictKind.RETRY
            channel.send_verdict(Verdict(report.seq, retry))
            return
        decision = self._classifier.classify(report)
        match decision:
            case FetchDecision(runs, then):
                is_mmio = then is _COMPLETE_MMIO
                self.stats.count("mmio" if is_mmio else _SOURCE_NAMES[report.address_source])
                self._pending[channel.vcpu] = Pending(channel, report.seq, _COMPLETE if is_mmio else _RETRY)
                self._fault(VcpuKey(channel.vcpu), _pages_of(runs), _VCPU, report.exit_ns * 1e-9 or None)
            case Retry(gpa, size_bytes):
                self.stats.populated += 1
                flags = 1 if size_bytes else 0
                channel.send_verdict(Verdict(report.seq, VerdictKind.RETRY, flags, gpa, size_bytes))
            case Complete():
                channel.send_verdict(Verdict(report.seq, VerdictKind.COMPLETE))
            case PassOn():
                self.stats.passed += 1
                channel.send_verdict(Verdict(report.seq, VerdictKind.PASS))
            case Escalate(log_line):
                self.stats.escalations += 1
                logger.error("%s", log_line)
                channel.send_verdict(Verdict(report.seq, VerdictKind.PASS))

    async def _start_vcpu(self, channel: VcpuChannel, report: Report) -> None:
        """Installs the pages that KVM itself touches before the vCPU's first KVM_RUN (DESIGN)."""
        assert self._vmm is not None
        self.stats.starts += 1
        self._learn_threads()
        slots = self._slot_table()
        paravirtual = {Gpa(msr & ~(TABLE_BYTES - 1)) for msr in report.msrs if msr & 1}
        await self._preinstall(slots, paravirtual)
        if self._vmm.alias_uffd is not None:
            walk = PageTableWalk.of_registers(report.cr0, report.cr3, report.cr4, report.efer)
            while tables := walk.next_level():
                walk.feed(await self._preinstall(slots, tables))
        channel.send_verdict(Verdict(report.seq, VerdictKind.RETRY))

    async def _preinstall(self, slots: SlotTable, addresses: Iterable[Gpa]) -> dict[Gpa, bytes]:
        """Fetches and installs guest pages; returns their contents. Addresses outside of RAM are left out."""
        assert self._vmm is not None
        offsets = {gpa: offset for gpa in addresses if (offset := slots.offset_of(gpa)) is not None}
        pages = {self.layout.page_at(offset) for offset in offsets.values()}
        absent = {page for page in pages if not self.engine.pages.is_present(page)}
        if absent:
            self.stats.preinstalled_pages += len(absent)
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._presence.append((absent, future))
            for page in absent:
                self._fault(PageKey(page), [page], Priority.VCPU)
            await future
        return {gpa: self._read(offset, TABLE_BYTES) for gpa, offset in offsets.items()}

    def _read(self, offset: int, size_bytes: int) -> bytes:
        assert self._vmm is not None
        region = self.layout.region_at(offset)
        return os.pread(self._vmm.ram_fds[region.index], size_bytes, offset - region.offset_bytes)

    def _read_events(self) -> None:
        """Takes events off the blocking userfaultfd: faults of threads that sleep in the kernel, and removals."""
        assert self._vmm is not None
        assert self._vmm.uffd is not None
        if self._lone is not None:
            try:
                events = self._take_events(self._lone)
                awaited = self._remove_all(events)
            finally:
                self._lone.leave()
        else:
            with self._shared.first:
                events = self._vmm.uffd.read_events(EVENTS_PER_WAKEUP_MAX)
                awaited = self._remove_all(events)
        self._install_zeros(awaited)
        for event in events:
            if isinstance(event, Fault):
                self._missed(event)

    def _take_events(self, lone: LoneFaults) -> list[Fault | Removed]:
        """Reads events. Those that are nothing but a missed page are requested at first hand; returns the others."""
        first_id, may_request = self.engine.next_request_id, self.session.takes_pages and self.engine.takes_lone
        taken = lone.take(first_id, self._generation, may_request=may_request)
        if not taken.faults:
            return taken.events
        self.session.send_pages(taken.frames, range(first_id, first_id + len(taken.faults)))
        now, have_neighbours = time.monotonic(), False
        for request_id, (page, thread_id) in enumerate(taken.faults, first_id):
            is_vcpu = self._is_vcpu(thread_id)
            self.stats.count("uffd_vcpu" if is_vcpu else "uffd_vmm")
            self.working_set.missed(page)
            priority = _VCPU if is_vcpu else _VMM
            have_neighbours |= self._requested(request_id, PageKey(page), page, priority, now, now, thread_id)
        if have_neighbours:  # not before: their requests take the next numbers
            self.session.pump(Lane.DEMAND)
        return taken.events

    def _missed(self, fault: Fault) -> None:
        assert self._installer is not None
        page = self._installer.page_of_fault(fault.address)
        if page is None:
            logger.error("userfaultfd: fault at %#x, which is in no region", fault.address)
            return
        is_vcpu = self._is_vcpu(fault.thread_id)
        self.stats.count("uffd_vcpu" if is_vcpu else "uffd_vmm")
        self._fault(PageKey(page), [page], _VCPU if is_vcpu else _VMM, who=fault.thread_id)

    def _is_vcpu(self, thread_id: int) -> bool:
        assert self._vmm is not None
        now = time.monotonic()
        if thread_id not in self._tid_to_vcpu and now - self._tids_read_at >= TIDS_AGE_MAX_S:
            self._tids_read_at = now
            self._learn_threads()
        return thread_id in self._tid_to_vcpu

    def _learn_threads(self) -> None:
        assert self._vmm is not None
        self._tid_to_vcpu = self._vmm.vcpu_tids()
        if self._lone is not None:
            self._lone.know_vcpus(self._tid_to_vcpu)

    def _remove_all(self, events: Iterable[Fault | Removed]) -> list[PageIndex]:
        """Marks all that the guest gave back; returns pages of it that a thread waits for."""
        return [page for event in events if isinstance(event, Removed) for page in self._removed(event)]

    def _removed(self, event: Removed) -> Iterator[PageIndex]:
        """Marks what the guest gave back; yields pages of it that a thread waits for."""
        assert self._installer is not None
        for run in self._installer.pages_of_range(event.start, event.end):
            yield from self.engine.removed(run)
            self._on_removed(run)
            self._leave_out(run)

    def _fault(
        self,
        key: VcpuKey | PageKey,
        pages: list[PageIndex],
        priority: Priority,
        since: float | None = None,
        who: int | None = None,
    ) -> None:
        """A thread (`who`, if the key does not say) missed pages at `since` (seconds of CLOCK_MONOTONIC; None: now)."""
        now = time.monotonic()
        since = now if since is None else min(since, now)
        for page in pages:
            if self.engine.pages.is_absent(page):
                self.working_set.missed(page)
        if len(pages) == 1 and (request_id := self._request_lone(key, pages[0], priority)):
            if self._requested(request_id, key, pages[0], priority, since, now, who):
                self.session.pump(Lane.DEMAND)
            return
        answer = self.engine.fault(key, pages, priority, since, who)
        if answer.ready:
            if isinstance(key, PageKey) and self._installer is not None:
                # It was installed just now (EEXIST), or the guest gave it back while it was: then it reads as zero,
                # and without this the thread would fault on it for ever.
                with contextlib.suppress(InstallError):
                    self._installer.install_zero(PageRun(key.page, 1))
            self.stats.times.resolved(priority, since, now, None, FaultResult.PRESENT)
            self._restart(Waiter(key, priority, since, tuple(pages)))
            return
        self._install_zeros(answer.zero_pages)
        self.session.pump(Lane.DEMAND)

    def _request_lone(self, key: VcpuKey | PageKey, page: PageIndex, priority: Priority) -> int:
        """Requests the page of most faults at first hand; then `_requested`. Returns the request's id; 0: it is no such
        fault."""
        lone, engine, session = self._lone, self.engine, self.session
        if lone is None or not session.takes_pages or not engine.takes_lone or engine.waits(key):
            return 0
        request_id = engine.next_request_id
        frame = lone.request(page, request_id, priority, self._generation)
        if frame is None:
            return 0
        session.send_pages(frame, (request_id,))
        return request_id

    def _requested(
        self,
        request_id: int,
        key: VcpuKey | PageKey,
        page: PageIndex,
        priority: Priority,
        since: float,
        now: float,
        who: int | None,
    ) -> bool:
        """Takes account of a fault whose page was requested at first hand; other arguments as of `_fault`.

        Returns:
            Neighbours wait to be requested.
        """
        fetch = self.engine.lone_fault(key, page, priority, since)
        assert fetch is not None, "what was requested is what the engine requests"
        assert fetch.request_id == request_id, "under the same number"
        self._in_flight[Lane.DEMAND][request_id] = Sent(now, priority)
        return self.engine.went(key if who is None else who, page, priority, since)

    @property
    def _generation(self) -> int:
        """Of the memory that is asked for."""
        assert self.session.lease is not None
        return self.session.lease.generation

    # ---- the session's side ----------------------------------------------------------------------

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        if lane is Lane.DEMAND:
            fetch = self.engine.next_demand() or self.engine.next_prefetch()
        elif self.stream_background and self._installer is not None:
            fetch = self.engine.next_background(time.monotonic())
            if fetch is None and not self._in_flight[lane] and not self.engine.finished:
                self._ask_background_again()  # else the next answer does
        else:
            fetch = None
        if fetch is None:
            return None
        self._in_flight[lane][fetch.request_id] = Sent(time.monotonic(), fetch.priority)
        return request_of(fetch, self.layout)

    def answered(self, lane: Lane, answer: Answer) -> None:
        now = time.monotonic()
        self._note_trip(lane, answer, now)
        if self._installing is None:
            self.engine.lost(answer.done)
            return
        lost_before = self.engine.stats.lost_pages
        for install in self.engine.arrived(answer.extents, answer.done, now):
            self._installing.install(install, answer.data, answer.data_offset)
        self._answered(lane, lost_before, answer.refusals)

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        """Puts the page of most answers into memory, at first hand; what does not go well goes the general way."""
        if self._lone is None:
            return None
        now = time.monotonic()
        came = self._lone.came(data, position)
        if came is None:
            return None
        request_id, page, _, data_at, queue_us, read_us = came
        waiters = self.engine.lone_installed(request_id, PageIndex(page))
        sent = self._in_flight[Lane.DEMAND].pop(request_id, None)
        if sent is not None:
            self._trip = Trip(sent.at, now, (queue_us + read_us) * 1e-6)
            self.stats.times.answered(sent, now)
        self._wake_all(waiters)
        if self._digest is not None:
            page_size = self.layout.region_of_page(page).page_size_bytes
            self._digest.installed(PageRun(PageIndex(page), 1), data[data_at : data_at + page_size])
        self._trip = None
        self._ask_for_more(Lane.DEMAND)
        return came

    def placed(self, lane: Lane, placed: Placed) -> None:
        now = time.monotonic()
        self._note_trip(lane, placed, now)
        lost_before = self.engine.stats.lost_pages
        for run, existed, digest in placed.placements:
            if self._digest is not None and existed:
                self._digest.leave_out(run)
            elif self._digest is not None:
                self._digest.summed(run, digest)
            woken = self.engine.placed(run, existed=existed)
            if woken:
                self._wake_all(woken)
        if self._installing is None:
            self.engine.lost(placed.done)
            return
        for install in self.engine.arrived(placed.extents, placed.done, now):
            self._installing.install(install, b"")
        self.engine.stats.clipped_pages += placed.clipped_pages
        self._answered(lane, lost_before, placed.refusals)

    def _note_trip(self, lane: Lane, answer: Answer | Placed, now: float) -> None:
        sent_at, in_flight = now, self._in_flight[lane]
        for done in answer.done:
            sent = in_flight.pop(done, None)
            if sent is not None:
                sent_at = min(sent_at, sent.at)
                self.stats.times.answered(sent, now)
        self._trip = Trip(sent_at, now, (answer.server_queue_us + answer.server_read_us) * 1e-6)

    def _answered(self, lane: Lane, lost_before: int, refusals: Iterable[str]) -> None:
        """An answer was dealt with: there may be more to ask for."""
        self._trip = None
        reasons = set(refusals)
        if self.engine.stats.lost_pages > lost_before and not reasons:
            reasons = {"LEFT_OUT"}  # a request is called done, and not all of its pages came
        if reasons:
            self._refused(reasons)
            self._check_finished()
        else:
            self._ask_for_more(lane)

    def _ask_for_more(self, lane: Lane) -> None:
        self.stats.refusals_in_a_row = 0
        if self.engine.demand_waits:
            self.session.pump(Lane.DEMAND)
        if lane is Lane.BACKGROUND or not (self._in_flight[Lane.BACKGROUND] or self._background_timer):
            self.session.pump(Lane.BACKGROUND)  # else its next answer does, or the timer
        self._check_finished()

    def _refused(self, reasons: set[str]) -> None:
        """The page server did not send what was asked for: it is asked again, but not at once."""
        self.last_refusal = ", ".join(sorted(reasons))
        if self.stats.refusals_in_a_row % REFUSALS_TOLD == 0:
            logger.warning("page server refused: %s", self.last_refusal)
        self.stats.refusals_in_a_row += 1
        loop = asyncio.get_running_loop()
        for lane in Lane:
            loop.call_later(REFUSAL_PAUSE_S, self.session.pump, lane)

    @property
    def is_refused(self) -> bool:
        """The page server has refused for a while, and answered nothing."""
        return self.stats.refusals_in_a_row >= REFUSALS_TOLD

    def lane_lost(self, lane: Lane) -> None:
        self.engine.lost(self._in_flight[lane])
        self._in_flight[lane].clear()
        if lane is Lane.DEMAND and self._lone is not None:
            self._lone.forget()
        if lane is not Lane.DEMAND:
            self.session.pump(Lane.DEMAND)  # threads may wait for pages that were in flight here

    def start_background(self) -> None:
        """Streams the rest of memory from now on."""
        self.stream_background = True
        self.session.pump(Lane.BACKGROUND)
        self._check_finished()

    def _ask_background_again(self) -> None:
        if self._background_timer is None:
            self._background_timer = asyncio.get_running_loop().call_later(BACKGROUND_RETRY_S, self._wake_background)

    def _wake_background(self) -> None:
        self._background_timer = None
        self.session.pump(Lane.BACKGROUND)

    def _install_zeros(self, pages: Iterable[PageIndex]) -> None:
        """Threads wait for pages that were removed."""
        for page in pages:
            assert self._installing is not None
            self._installing.install_zero(page)

    def _leave_out(self, run: PageRun) -> None:
        if self._digest is not None:
            self._digest.leave_out(run)

    # ---- threads go on ---------------------------------------------------------------------------

    def _wake_all(self, waiters: list[Waiter]) -> None:
        trip = self._trip
        for waiter in waiters:
            self._restart(waiter)
            now = time.monotonic()
            result = _FETCHED if trip is not None and trip.sent_at >= waiter.since else _JOINED
            self.stats.times.resolved(waiter.priority, waiter.since, now, trip, result)
            if now - waiter.since > self.slow_faults.limit_s:
                self.slow_faults.ended(waiter, now)

    def _restart(self, waiter: Waiter) -> None:
        key = waiter.key
        if isinstance(key, VcpuKey):
            pending = self._pending.pop(key.vcpu, None)
            if pending is not None:
                pending.channel.send_verdict(Verdict(pending.seq, pending.verdict))
            blocked_s, waited_s = self.stats.blocked_s_by_vcpu, time.monotonic() - waiter.since
            blocked_s[key.vcpu] = blocked_s.get(key.vcpu, 0.0) + waited_s
        elif isinstance(key, PageKey):
            if self._installer is not None:
                self._installer.wake(PageRun(key.page, 1))
            if self._presence:
                self._note_presence(key.page)

    def _note_presence(self, page: PageIndex) -> None:
        for entry in list(self._presence):
            missing, future = entry
            missing.discard(page)
            if not missing:
                self._presence.remove(entry)
                if not future.done():
                    future.set_result(None)

    def _check_finished(self) -> None:
        if self.engine.finished:
            self.finished.set()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _pages_of(runs: Sequence[PageRun]) -> list[PageIndex]:
    if len(runs) == 1 and runs[0].count == 1:
        return [runs[0].first]
    return [PageIndex(page) for run in runs for page in range(run.first, run.end)]


def _target_of(vmm: AttachedVmm, *, with_digest: bool) -> tuple[Target, list[int]]:
    """The VMM's memory for the bulk process, and the descriptors that it takes to reach it."""
    uffds = {"uffd": vmm.uffd, "alias_uffd": vmm.alias_uffd}
    descriptors = {name: uffd.fileno() for name, uffd in uffds.items() if uffd is not None}
    if vmm.uffd is None:
        descriptors = {f"ram{index}": number for index, number in enumerate(vmm.ram_fds)}
    return Target(replace(vmm.handover, descriptors=tuple(descriptors)), with_digest), list(descriptors.values())


def _installer_of(vmm: AttachedVmm, shared: SharedPages) -> Installer:
    if vmm.uffd is None:
        return FileInstaller(vmm.layout, vmm.ram_fds, shared.first)
    return UffdInstaller(vmm.layout, vmm.handover, vmm.uffd, vmm.alias_uffd)


def layout_text(layout: Layout) -> str:
    """Sizes for a message: ``128 MiB of 4 KiB pages``."""
    return ", ".join(
        f"{region.size_bytes >> 20} MiB of {region.page_size_bytes >> 10} KiB pages" for region in layout.regions
    )
