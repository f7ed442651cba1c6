"""The receiver: the real engine, classifier and verification over simulated kernel and network.

The glue is that of `farfault_client.receive.pager`, synchronous and in virtual time. What must always hold is
checked where it happens.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from farfault.codec import DecodedBatch, decode_batch
from farfault_client.engine import EngineConfig, Extent, ExtentResult, FaultEngine, Fetch, PageState, Priority
from farfault_client.session.answers import Answer, BadAnswerError, request_of, verify
from farfault_shim.attach.wire import Report
from farfault_shim.exits.classifier import (
    Complete,
    Escalate,
    ExitClassifier,
    PassOn,
    Retry,
    SlotTable,
)
from farfault_shim.exits.classifier import Fetch as FetchDecision
from farfault_shim.layout import Layout, PageIndex, PageRun
from google.protobuf.message import DecodeError

if TYPE_CHECKING:
    from sim_clock import Clock
    from sim_guest import Guest
    from sim_source import Network, Stream

PAGE = 4096
ZEROS = bytes(PAGE)
RECONNECT_S = 0.02
BACKGROUND_RETRY_S = 0.005
WATCHDOG_S = 0.5
"""A request that is not answered for this long breaks its lane."""
RETRY_S = 0.0001
REPORT_S = 0.01
"""The bulk process says within this time what it has placed; really much less, but then little comes in between."""


@dataclass(frozen=True, slots=True)
class VcpuKey:
    vcpu: int


@dataclass(frozen=True, slots=True)
class PageKey:
    page: int


@dataclass(frozen=True)
class Parts:
    """The code under test; a planted bug replaces one."""

    engine: Callable[[Layout, EngineConfig], FaultEngine] = FaultEngine
    classifier: type[ExitClassifier] = ExitClassifier
    verify: Callable[[DecodedBatch, Layout, int], Answer] = verify
    to_install: Callable[[FaultEngine, PageRun], list[PageRun]] = FaultEngine.to_install
    may_place: Callable[[FaultEngine, PageIndex], bool] = lambda engine, page: (
        engine.pages.state(page) is PageState.IN_FLIGHT
    )
    awaits: Callable[[FaultEngine, Fetch], bool] = lambda engine, fetch: engine.awaits(
        fetch.request_id, fetch.runs[0].first
    )
    resident: Callable[[Guest], Iterable[int]] = lambda guest: sorted(guest.kernel.pages)


@dataclass
class Lane:
    """Streams of one kind, and the requests that are on their way on them."""

    is_demand: bool
    streams: list[Stream] = field(default_factory=list)
    in_flight: dict[int, tuple[Fetch, float]] = field(default_factory=dict)
    turn: int = 0


class Receiver:
    """One life of the receiver, from its start to its crash.

    Args:
        removed: journal of the pages that the guest gave back, kept over crashes.
        generation: of the memory, from the lease.
    """

    def __init__(
        self,
        clock: Clock,
        rng: random.Random,
        guest: Guest,
        network: Network,
        parts: Parts,
        removed: list[PageRun],
        generation: int,
    ) -> None:
        self.clock, self.rng, self.guest, self.network, self.parts = clock, rng, guest, network, parts
        self.removed_log, self.generation = removed, generation
        self.config = EngineConfig(
            demand_pages_max=rng.choice((2, 8, 256)),
            batch_bytes_max=rng.choice((2, 4, 64)) * PAGE,
            neighbour_pages_max=rng.choice((0, 8, 64)),
            background_bytes_per_s=rng.choice((0, 0, 0, 4_000_000)),
        )
        self.engine = parts.engine(guest.layout, self.config)
        self.engine.window.floor_bytes = self.engine.window.size_bytes = self.config.batch_bytes_max
        self.classifier = parts.classifier(guest.layout, lambda: SlotTable(guest.slots), self.engine.pages)
        self.lanes = {True: Lane(True), False: Lane(False)}
        self.is_alive = True
        self.bad_answers = 0
        self.lone_share = rng.choice((0.0, 0.5, 0.9))  # of faults that may go the short way, those that do
        self.unreported: Counter[int] = Counter()  # placed by the bulk process, which has not said so yet
        self._background_timer = False
        network.hostile_page = self._page_not_in_flight
        for page in rng.sample(range(guest.layout.page_count), min(guest.layout.page_count, rng.choice((0, 0, 5)))):
            self.engine.hint(PageRun(PageIndex(page), 1))

    def start(self) -> None:
        """Attaches: the installed set from the kernel, the removed set from the log; then lanes."""
        for page in self.parts.resident(self.guest):
            self.engine.present(PageRun(PageIndex(page), 1))
        for run in self.removed_log:
            for absent in self.engine.pages.runs(*run, PageState.ABSENT):
                self.engine.removed(absent)
        self.events_wait()
        for is_demand in self.lanes:
            self._connect(is_demand)
        self.guest.attach(self)
        self.clock.after(WATCHDOG_S, self._watch)

    def crash(self) -> None:
        self.is_alive = False
        self.guest.attach(None)
        for lane in self.lanes.values():
            for stream in lane.streams:
                stream.is_open = False

    # ---- the guest's side -------------------------------------------------------------------------

    def vcpu_exit(self, raw: Report) -> None:
        decision = self.classifier.classify(raw)
        match decision:
            case FetchDecision(pages, _):
                wanted = [PageIndex(page) for run in pages for page in range(run.first, run.end)]
                self._fault(VcpuKey(raw.vcpu), wanted, Priority.VCPU)
            case Retry() | Complete():
                self.clock.after(RETRY_S, partial(self._restart, raw.vcpu))
            case PassOn(reason):
                raise AssertionError(f"a far fault was passed on: {reason}")
            case Escalate(log_line):
                raise AssertionError(f"a far fault was escalated: {log_line}")

    def _restart(self, vcpu: int) -> None:
        if self.is_alive:
            self.guest.restart_vcpu(vcpu)

    def kernel_fault(self, page: int, is_vcpu: bool) -> None:
        self._fault(PageKey(page), [PageIndex(page)], Priority.VCPU if is_vcpu else Priority.VMM)

    def kicked(self, vcpu: int) -> None:
        self.engine.forget(VcpuKey(vcpu))

    def events_wait(self) -> None:
        """The userfaultfd is readable; the event loop comes to it a little later."""
        self.clock.after(self.rng.random() * 0.001, self._read_events)

    def _read_events(self) -> None:
        if not self.is_alive:
            return
        for run in self.guest.kernel.read_events():
            self.removed_log.append(run)
            for page in self.engine.removed(run):
                self._install(page, ZEROS)

    def _fault(self, key: VcpuKey | PageKey, pages: list[PageIndex], priority: Priority) -> None:
        if len(pages) == 1 and self._went_alone(key, pages[0], priority):
            self.check()
            return
        answer = self.engine.fault(key, pages, priority, self.clock.now)
        if answer.ready:
            for page in pages:
                if page not in self.guest.kernel.pages:
                    self._install(page, ZEROS)  # it was given back while it was being installed
            self.clock.after(RETRY_S, lambda: self._wake(key))
            return
        for page in answer.zero_pages:
            self._install(page, ZEROS)
        self._pump(True)
        self.check()

    def _went_alone(self, key: VcpuKey | PageKey, page: PageIndex, priority: Priority) -> bool:
        """The short way of a fault, where there is a connection, and mostly."""
        lane = self.lanes[True]
        if not lane.streams or self.rng.random() >= self.lone_share:
            return False
        fetch = self.engine.lone_fault(key, page, priority, self.clock.now)
        if fetch is None:
            return False
        self._send(lane, fetch)
        if self.engine.went(key, page, priority, self.clock.now):
            self._pump(True)
        return True

    def _wake(self, key: object) -> None:
        if not self.is_alive:
            return
        match key:
            case VcpuKey(vcpu):
                self.guest.restart_vcpu(vcpu)
            case PageKey(page):
                self.guest.wake_page(page)

    # ---- the network's side -----------------------------------------------------------------------

    def _connect(self, is_demand: bool) -> None:
        if not self.is_alive:
            return
        lane = self.lanes[is_demand]
        streams = [
            self.network.connect(partial(self._received, is_demand), partial(self._lane_lost, is_demand))
            for _ in range(self.rng.randint(1, 2))
        ]
        if None in streams:
            self.clock.after(RECONNECT_S, partial(self._connect, is_demand))
            return
        lane.streams = [stream for stream in streams if stream is not None]
        self._pump(is_demand)

    def _lane_lost(self, is_demand: bool) -> None:
        lane = self.lanes[is_demand]
        if not self.is_alive or not lane.streams:
            return
        for stream in lane.streams:
            stream.is_open = False
        lane.streams = []
        self.engine.lost(list(lane.in_flight))
        lane.in_flight.clear()
        self.clock.after(RECONNECT_S * (0.5 + self.rng.random()), partial(self._connect, is_demand))
        self._pump(True)  # threads may wait for pages that were in flight here
        self.check()

    def _pump(self, is_demand: bool) -> None:
        lane = self.lanes[is_demand]
        if not lane.streams:
            return
        engine = self.engine
        while lane.streams:
            if is_demand:
                fetch = engine.next_demand() or engine.next_prefetch()
            else:
                fetch = engine.next_background(self.clock.now)
            if fetch is None:
                break
            self._send(lane, fetch)
        if not is_demand and not engine.finished and not self._background_timer:
            self._background_timer = True
            self.clock.after(BACKGROUND_RETRY_S, self._background_again)

    def _send(self, lane: Lane, fetch: Fetch) -> None:
        self._check_request(lane.is_demand, fetch)
        lane.in_flight[fetch.request_id] = (fetch, self.clock.now)
        lane.turn += 1
        request = request_of(fetch, self.guest.layout).SerializeToString()
        lane.streams[lane.turn % len(lane.streams)].send(request)

    def _background_again(self) -> None:
        self._background_timer = False
        if self.is_alive:
            self._pump(False)

    def _received(self, is_demand: bool, raw: bytes) -> None:
        if not self.is_alive:
            return
        try:
            answer = self.parts.verify(decode_batch(raw), self.guest.layout, self.generation)
        except (BadAnswerError, DecodeError):
            self.bad_answers += 1
            self._lane_lost(is_demand)
            return
        if is_demand:
            if not self._is_lone_page(answer):
                self._install_answer(answer)
            return
        # What nobody asked for may be garbage, and somebody may ask for it while the rest is placed: a server that lies
        # about pages that it was asked for is not what is played here.
        pages: list[tuple[PageIndex, int]] = []
        without_data: list[Extent] = []
        position = answer.data_offset
        for run, result in answer.extents:
            for page in map(PageIndex, range(run.first, run.end)):
                asked_for = self.engine.pages.state(page) is PageState.IN_FLIGHT
                if result is ExtentResult.DATA:
                    pages += [(page, position)] * asked_for
                    position += PAGE
                elif asked_for or result is ExtentResult.REFUSED:
                    without_data.append(Extent(PageRun(page, 1), result))
        self._place(answer._replace(extents=without_data), pages, [])

    def _place(self, answer: Answer, pages: list[tuple[PageIndex, int]], placed: list[tuple[PageIndex, bool]]) -> None:
        """The bulk process: installs what is in flight, and says so a little later."""
        if not self.is_alive:
            return
        for position, (page, begin) in enumerate(pages):
            if not self.parts.may_place(self.engine, page):
                continue
            error = self.guest.kernel.copy(page, bytes(answer.data[begin : begin + PAGE]))
            if error == errno.EAGAIN:
                self.clock.after(RETRY_S, partial(self._place, answer, pages[position:], placed))
                return
            placed.append((page, error == errno.EEXIST))
            self.unreported[page] += 1
            if self.rng.random() < 0.1:  # the lock is given back in between
                rest = pages[position + 1 :]
                self.clock.after(self.rng.random() * 0.0002, partial(self._place, answer, rest, placed))
                return
        self.clock.after(self.rng.random() * REPORT_S, partial(self._placed, answer, placed))

    def _placed(self, answer: Answer, placed: list[tuple[PageIndex, bool]]) -> None:
        if not self.is_alive:
            return
        for page, existed in placed:
            self.unreported[page] -= 1
            for waiter in self.engine.placed(PageRun(page, 1), existed=existed):
                self._wake(waiter.key)
            is_there = page in self.guest.kernel.pages or self.engine.pages.state(page) is not PageState.INSTALLED
            assert is_there or self.guest.kernel.removals, f"page {page} was given back since, and passes for installed"
        self._install_answer(answer)

    def _is_lone_page(self, answer: Answer) -> bool:
        """The short way of an answer: one page with data, for a request that asked for it and nothing else."""
        if len(answer.done) != 1 or len(answer.extents) != 1 or answer.extents[0].result is not ExtentResult.DATA:
            return False
        (request_id,), ((run, _),) = answer.done, answer.extents
        fetch, _ = self.lanes[True].in_flight.get(request_id, (None, 0.0))
        if fetch is None or fetch.runs != (run,) or run.count != 1 or not self.parts.awaits(self.engine, fetch):
            return False
        data = bytes(answer.data[answer.data_offset : answer.data_offset + PAGE])
        if self.guest.kernel.copy(run.first, data):
            return False
        del self.lanes[True].in_flight[request_id]
        for waiter in self.engine.lone_installed(request_id, run.first):
            self._wake(waiter.key)
        for demand in self.lanes:
            self._pump(demand)
        self.check()
        return True

    def _install_answer(self, answer: Answer) -> None:
        for lane in self.lanes.values():
            for request_id in answer.done:
                lane.in_flight.pop(request_id, None)
        for order in self.engine.arrived(answer.extents, answer.done, self.clock.now):
            base = answer.data_offset + order.data_offset
            position = order.run.first
            while parts := self.parts.to_install(self.engine, PageRun(PageIndex(position), order.run.end - position)):
                page = parts[0].first
                begin = base + (page - order.run.first) * PAGE
                data = ZEROS if order.data_offset < 0 else bytes(answer.data[begin : begin + PAGE])
                self._install(page, data, in_order=True)
                position = page + 1
        if not self.is_alive:
            return
        for demand in self.lanes:
            self._pump(demand)
        self.check()

    def _install(self, page: int, data: bytes, *, in_order: bool = False) -> None:
        kernel = self.guest.kernel
        run = PageRun(PageIndex(page), 1)
        while (error := kernel.copy(page, data)) == errno.EAGAIN:
            self._read_events()
            if in_order and not self.parts.to_install(self.engine, run):
                return  # it was removed just now
        is_twice = error == errno.EEXIST and in_order and not self.unreported[page]
        assert not is_twice, f"page {page} was installed twice"
        for waiter in self.engine.installed(run, existed=error == errno.EEXIST, zero=data == ZEROS):
            self._wake(waiter.key)

    def _watch(self) -> None:
        """A server that is there and says nothing is left."""
        if not self.is_alive:
            return
        for is_demand, lane in self.lanes.items():
            if any(self.clock.now - sent_at > WATCHDOG_S for _, sent_at in lane.in_flight.values()):
                self._lane_lost(is_demand)
        if not (self.engine.finished and self.guest.done):
            self.clock.after(WATCHDOG_S / 2, self._watch)

    # ---- what always holds --------------------------------------------------------------------------

    def _check_request(self, is_demand: bool, fetch: Fetch) -> None:
        lanes = self.lanes.values()
        flying = {page for lane in lanes for other, _ in lane.in_flight.values() for page in _pages(other)}
        for page in _pages(fetch):
            assert page not in flying, f"page {page} is fetched twice at once"
            assert page not in self.guest.kernel.removed, f"page {page} is fetched after it was removed"
            is_there = page in self.guest.kernel.pages and not self.unreported[page]
            assert not is_there, f"page {page} is fetched though it is there"
        assert fetch.size_bytes <= max(self.config.demand_bytes_max if is_demand else self.config.batch_bytes_max, PAGE)
        if not is_demand:
            window = self.engine.window.size_bytes
            assert self.engine.background_in_flight_bytes <= window + self.config.batch_bytes_max

    def check(self) -> None:
        """Demand first, nobody forgotten, queues bounded."""
        engine = self.engine
        waiting = engine.waiting
        assert len(waiting) <= len(self.guest.vcpus) + self.guest.layout.page_count
        in_flight = {request for lane in self.lanes.values() for request in lane.in_flight}
        assert engine.requests_in_flight == len(in_flight), "a request was forgotten"
        connected = bool(self.lanes[True].streams)
        for waiter in waiting:
            for page in waiter.pages:
                state = engine.pages.state(page)
                assert state is not PageState.ABSENT, f"page {page} has a waiter and nobody wants it"
                assert state is not PageState.WANTED or not connected, f"a fault on page {page} waits to be sent"

    def _page_not_in_flight(self) -> int | None:
        pages = [
            page
            for page in range(self.guest.layout.regions[0].page_count)
            if self.engine.pages.state(page) is not PageState.IN_FLIGHT
        ]
        return self.rng.choice(pages) if pages else None


def _pages(fetch: Fetch) -> Iterable[int]:
    for run in fetch.runs:
        yield from range(run.first, run.end)
