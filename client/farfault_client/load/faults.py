"""The faults of virtual vCPUs: which are due, waiting and answered. No I/O and no clock.

A driver

1. says `begin`, then `advance` whenever `next_due` has come, and `resume` after answers;
2. asks `take_wakeups` which connections have something to send, and `next_request` until it returns None;
3. tells `answered` and `lane_lost`;
4. ends with `stop` and, once `is_drained` or out of patience, `end`.

A closed-loop vCPU waits for its page and then faults again at once. In an open loop faults fall due at times that
do not depend on answers; their latency counts from then, so that a slow server cannot hide by slowing the load down.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from farfault.v1 import pages_pb2 as pb
from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine import ExtentResult, Fetch, Priority
from farfault_client.load.plan import ERRORS_IN_A_ROW_MAX, OUTSTANDING_MAX, PAGES_PER_REQUEST
from farfault_client.load.present import PresentPages
from farfault_client.load.schedule import Schedule
from farfault_client.load.tally import Tally, record
from farfault_client.load.vcpus import Vcpus
from farfault_client.load.verifier import SeedVerifier
from farfault_client.session.answers import Answer, request_of


class Ending(Enum):
    """Why a run issues no more faults."""

    TIME = "its time was over"
    TOLD = "it was told to end"
    PAGES = "all pages asked for were fetched"
    COMPLETE = "every page of the memory was fetched"
    TRACE = "the trace was over"
    REFUSED = "too many faults in a row were refused"


class Waiter(NamedTuple):
    """A fault that waits for a page."""

    vcpu: int
    due: float
    issued: float
    is_write: bool


class _Flight:
    """A page that was asked for, and who waits for it."""

    __slots__ = ("request_id", "waiters")

    def __init__(self, waiter: Waiter) -> None:
        self.request_id = 0  # 0: not sent yet
        self.waiters = [waiter]


class FaultLoad:
    """The faults of one process.

    Args:
        layout: of the served memory.
        vcpus: what they touch.
        connections: that they share.
        requests_max: requests in flight on one connection; the server's limit.
        pages_per_request: faults that travel together, at most.
        refetch: pages that have come may be asked for again.
        verifier: compares pages with their seed; None: the session's checksum is all there is.

    Attributes:
        tally: of the current stretch of time; `take_tally` begins the next.
        ended_by: why no more faults are issued; None: they are.
        refusals: answered statuses that were no pages, with their numbers.
    """

    def __init__(
        self,
        layout: Layout,
        vcpus: Vcpus,
        *,
        connections: int = 1,
        requests_max: int = 256,
        pages_per_request: int = PAGES_PER_REQUEST,
        refetch: bool = False,
        verifier: SeedVerifier | None = None,
    ) -> None:
        self._layout = layout
        self._vcpus = vcpus
        self._requests_max = requests_max
        self._pages_per_request = pages_per_request
        self._refetch = refetch
        self._verifier = verifier
        self._present = PresentPages(layout.page_count)
        self._flights: dict[int, _Flight] = {}
        self._pending: Sequence[deque[int]] = [deque() for _ in range(connections)]
        self._requests: Sequence[dict[int, list[int]]] = [{} for _ in range(connections)]
        self._wakeups: set[int] = set()
        self._released: list[int] = []  # vCPUs that go on at the next `resume`
        self._next_request_id = 1
        self._outstanding = 0
        self._errors_in_a_row = 0
        self._schedule: Schedule | None = None
        self._measured_from = self._until = self._last_answer_at = 0.0
        self._is_measured = False
        self._pages_left = 0
        self.ended_by: Ending | None = None
        self.refusals: Counter[str] = Counter()
        self.tally = Tally()

    # ---- a run -----------------------------------------------------------------------------------

    def begin(
        self, now: float, *, measured_from: float, until: float, schedule: Schedule | None = None, pages_max: int = 0
    ) -> None:
        """Starts a run of a fresh guest; nothing of an earlier one may be in flight.

        Args:
            now: seconds on the driver's clock, as everywhere.
            measured_from: faults due earlier are warm-up and are not counted.
            until: no fault that is due later is issued.
            schedule: of an open loop; None: closed loop.
            pages_max: counted pages; 0: no bound.
        """
        assert not self._flights, "the run before was not ended"
        self._schedule = schedule
        self._measured_from, self._until = measured_from, until
        self._last_answer_at = measured_from
        self._pages_left = pages_max or -1
        self._errors_in_a_row = 0
        self.ended_by = None
        self.refusals.clear()
        self._is_measured = False
        self._present.clear()
        self._vcpus.rewind()
        self.tally = Tally(started_at=measured_from, ended_at=measured_from)
        self._released = [] if schedule else list(range(len(self._vcpus)))
        if not len(self._vcpus):
            self.stop(Ending.TRACE)
        self.advance(now)
        self.resume(now)

    def next_due(self) -> float | None:
        """When `advance` is to be called next; None: not before an answer comes."""
        if self.ended_by is not None:
            return None
        if self._schedule is not None and self._outstanding < OUTSTANDING_MAX:
            due = self._schedule.peek()
            return min(self._until, due) if due is not None else None
        return self._until if self._is_measured else self._measured_from

    def advance(self, now: float) -> None:
        """Time has passed: ends the warm-up or the run, and issues what is due."""
        self._end_warm_up(now)
        if self._schedule is not None:
            self._issue_due(self._schedule, now)
        if now >= self._until:
            self.stop(Ending.TIME)

    def resume(self, now: float) -> None:
        """Answers have come: closed-loop vCPUs whose page is there fault again; what was held back is issued."""
        self._end_warm_up(now)
        if self._schedule is not None:
            self._issue_due(self._schedule, now)
        if self._released:
            released, self._released = self._released, []
            for vcpu in released:
                if self.ended_by is not None:
                    return
                self._issue(vcpu, now, now)

    def stop(self, ending: Ending) -> None:
        """No more faults; those that wait are still answered. The first reason stays."""
        self.ended_by = self.ended_by or ending

    @property
    def is_drained(self) -> bool:
        """Nothing waits for an answer, and nothing more will be issued."""
        return self.ended_by is not None and not self._flights

    @property
    def measured_until(self) -> float:
        """The end of the time that was measured: the last answer, or the end of the run if that was later."""
        return max(self._last_answer_at, self._until) if self.ended_by is Ending.TIME else self._last_answer_at

    def end(self, now: float) -> None:
        """Ends the run: what was not answered by now counts as an error, what was due but not issued as unfinished."""
        for flight in self._flights.values():
            for waiter in flight.waiters:
                if waiter.due >= self._measured_from:
                    self.tally.errors += 1
                    record(self.tally.latency, now - waiter.due)
        self._flights.clear()
        self._outstanding = 0
        for pending, requests in zip(self._pending, self._requests, strict=True):
            pending.clear()
            requests.clear()
        if self._schedule is not None and self.ended_by not in {Ending.PAGES, Ending.COMPLETE, Ending.TRACE}:
            self._count_backlog(self._schedule, min(now, self._until))

    def take_tally(self, now: float) -> Tally:
        """What was counted since the last call, or since the end of the warm-up."""
        tally, self.tally = self.tally, Tally(started_at=now, ended_at=now)
        tally.ended_at = max(tally.started_at, now)
        return tally

    # ---- what a lane's user is asked -----------------------------------------------------------------

    def take_wakeups(self) -> Iterable[int]:
        """Connections that have something to send since the last call."""
        wakeups, self._wakeups = self._wakeups, set()
        return wakeups

    def next_request(self, connection: int) -> pb.FetchRequest | None:
        """The next request of a connection: all faults that wait for it, up to the bound."""
        pending, requests = self._pending[connection], self._requests[connection]
        if not pending or len(requests) >= self._requests_max:
            return None
        count = min(len(pending), self._pages_per_request)
        pages = [pending.popleft() for _ in range(count)]
        request_id = self._next_request_id
        self._next_request_id += 1
        requests[request_id] = pages
        for page in pages:
            self._flights[page].request_id = request_id
        runs = tuple(PageRun(PageIndex(page), 1) for page in pages)
        return request_of(Fetch(request_id, Priority.VCPU, runs, 0), self._layout)

    def answered(self, connection: int, answer: Answer, now: float) -> None:
        """A verified answer has come at `now`. Call `resume` after it."""
        assert isinstance(answer.data, bytes), "lanes of this process give bytes"
        self._last_answer_at = max(self._last_answer_at, now)
        offset = answer.data_offset
        for run, result in answer.extents:
            if result is ExtentResult.REFUSED:
                self._refused(run, answer.refusals)
                continue
            page_size_bytes = self._layout.region_of_page(run.first).page_size_bytes
            for page in range(run.first, run.end):
                self._page_came(page, page_size_bytes, now)
            if self._verifier is not None:
                self._verifier.check(run, answer.data if result is ExtentResult.DATA else None, offset)
            if result is ExtentResult.DATA:
                offset += run.count * page_size_bytes
        self._finish_requests(connection, answer.done)

    def lane_lost(self, connection: int) -> None:
        """The connection is gone: what was in flight on it is asked for again; its faults go on waiting."""
        requests = self._requests[connection]
        for request_id, pages in requests.items():
            for page in pages:
                flight = self._flights.get(page)
                if flight is not None and flight.request_id == request_id:
                    flight.request_id = 0
                    self._pending[connection].append(page)
                    self.tally.asked_again += 1
        requests.clear()

    # ---- within ----------------------------------------------------------------------------------

    def _end_warm_up(self, now: float) -> None:
        """Before the first fault that is counted: what the warm-up fetched does not count, nor is it spared."""
        if not self._is_measured and now >= self._measured_from:
            self._is_measured = True
            self._present.clear()

    def _issue_due(self, schedule: Schedule, now: float) -> None:
        while self.ended_by is None and self._outstanding < OUTSTANDING_MAX:
            due = schedule.peek()
            vcpu = self._vcpus.in_turn()
            if due is None or vcpu is None:
                self.stop(Ending.TRACE)
                return
            if due > now or due >= self._until:
                return
            schedule.advance()
            self._vcpus.advance_turn()
            self._issue(vcpu, due, now)

    def _issue(self, vcpu: int, due: float, now: float) -> None:
        """One fault of a vCPU; none where its access is a hit or there is nothing more to touch."""
        page = self._next_page(vcpu)
        if page is None:
            return
        waiter = Waiter(vcpu, due, now, self._vcpus.was_write(vcpu))
        is_measured = due >= self._measured_from
        flight = self._flights.get(page)
        if flight is not None:
            flight.waiters.append(waiter)
        else:
            if is_measured and self._pages_left == 0:
                self.stop(Ending.PAGES)
                return
            self._pages_left -= is_measured
            self._fetch(page, waiter)
        self._outstanding += 1
        self.tally.offered += is_measured

    def _fetch(self, page: int, waiter: Waiter) -> None:
        connection = waiter.vcpu % len(self._pending)
        self._flights[page] = _Flight(waiter)
        self._pending[connection].append(page)
        self._wakeups.add(connection)

    def _next_page(self, vcpu: int) -> int | None:
        present = None if self._refetch else self._present
        page = self._vcpus.next_page(vcpu, present, is_open_loop=self._schedule is not None)
        if page is not None or (self._refetch and not self._vcpus.is_exhausted):
            return page
        if self._present.is_complete and not self._is_measured:
            self._present.clear()  # the warm-up goes on; its pages do not count
            return self._vcpus.next_page(vcpu, self._present, is_open_loop=self._schedule is not None)
        if self._present.is_complete:
            self.stop(Ending.COMPLETE)
        elif self._vcpus.is_exhausted:
            self.stop(Ending.TRACE)
        return None

    def _page_came(self, page: int, page_size_bytes: int, now: float) -> None:
        flight = self._flights.pop(page, None)
        tally = self.tally
        if flight is None:
            tally.unexpected += 1
            return
        self._errors_in_a_row = 0
        if not self._refetch:
            self._present.add(page)
        for vcpu, due, issued, is_write in flight.waiters:
            if due >= self._measured_from:
                tally.faults += 1
                tally.writes += is_write
                record(tally.latency, now - due)
                if self._schedule is not None:
                    record(tally.service, now - issued)
                    record(tally.issue_delay, issued - due)
            self._release(vcpu)
        if flight.waiters[0].due >= self._measured_from:
            tally.pages += 1
            tally.page_bytes += page_size_bytes

    def _refused(self, run: PageRun, statuses: tuple[str, ...]) -> None:
        self.refusals.update(set(statuses))
        for page in range(run.first, run.end):
            self._fail(page)

    def _fail(self, page: int) -> None:
        flight = self._flights.pop(page, None)
        if flight is None:
            return
        for waiter in flight.waiters:
            self.tally.errors += waiter.due >= self._measured_from
            self._release(waiter.vcpu)
        self._errors_in_a_row += 1
        if self._errors_in_a_row >= ERRORS_IN_A_ROW_MAX:
            self.stop(Ending.REFUSED)

    def _release(self, vcpu: int) -> None:
        self._outstanding -= 1
        if self._schedule is None:
            self._released.append(vcpu)

    def _finish_requests(self, connection: int, done: Iterable[int]) -> None:
        for request_id in done:
            for page in self._requests[connection].pop(request_id, ()):
                flight = self._flights.get(page)
                if flight is not None and flight.request_id == request_id:
                    self.refusals["LEFT_OUT"] += 1
                    self._fail(page)
        if self._pending[connection]:
            self._wakeups.add(connection)

    def _count_backlog(self, schedule: Schedule, until: float) -> None:
        for due, count in schedule.backlog(until):
            if due >= self._measured_from:
                self.tally.offered += count
                self.tally.unfinished += count
                record(self.tally.latency, until - due, count)

    @property
    def vcpu_count(self) -> int:
        """Virtual vCPUs of this process; those of its share of the trace in a replay."""
        return len(self._vcpus)

    @property
    def hits(self) -> int:
        """Accesses to pages that were present, warm-up included."""
        return self._vcpus.hits
