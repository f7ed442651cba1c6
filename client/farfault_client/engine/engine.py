"""The fault engine: faults, arrivals and losses in; requests, installs and woken waiters out.

It does no I/O and reads no clock. A driver

1. tells it what happened: `fault`, `removed`, `present`, `arrived`, `installed`, `lost`;
2. asks what to send: `next_demand`, `next_prefetch`, `next_background`, until they return None;
3. installs what `arrived` returns, then says `installed` and restarts the waiters that come back.

Promises: at most one fetch per page is in flight; a fault on a page in flight raises its priority and
waits; an arrival is clipped to what is still wanted; a removed page is never fetched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine.neighbours import DEPTH_MAX_PAGES, NeighbourPrefetch
from farfault_client.engine.page_map import PageMap
from farfault_client.engine.rate import RateLimit
from farfault_client.engine.states import PageInput, PageState, Priority
from farfault_client.engine.window import BackgroundWindow


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of the engine.

    Attributes:
        demand_pages_max: pages in one demand request.
        batch_bytes_max: bytes in one background request.
        neighbour_pages_max: longest neighbour prefetch; 0 turns it off.
        background_bytes_per_s: cap of the background lane; 0: none. Demand is never capped.
        waiters_max: threads that may wait at one time.
    """

    demand_pages_max: int = 256
    batch_bytes_max: int = 256 << 10
    neighbour_pages_max: int = DEPTH_MAX_PAGES
    background_bytes_per_s: int = 0
    waiters_max: int = 65536


class Waiter(NamedTuple):
    """A thread that waits for pages.

    Attributes:
        key: names it for the driver; a second fault of the same key replaces the first.
        priority: VCPU or VMM.
        since: when it began to wait, in seconds.
        pages: what it waits for; all of them must be present.
    """

    key: object
    priority: Priority
    since: float
    pages: tuple[PageIndex, ...]


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
    """Counters since the start; pages and faults, not bytes."""

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
    requests_by_priority: dict[Priority, int] = field(default_factory=lambda: dict.fromkeys(Priority, 0))


class FaultEngine:
    """Sans-I/O core of the pager.

    Args:
        layout: guest memory.
        config: bounds.
    """

    def __init__(self, layout: Layout, config: EngineConfig | None = None) -> None:
        self.layout = layout
        self.config = config or EngineConfig()
        self.pages = PageMap(layout.page_count)
        self.stats = EngineStats()
        self.window = BackgroundWindow()
        self.rate = RateLimit(self.config.background_bytes_per_s)
        self.neighbours = NeighbourPrefetch(self.config.neighbour_pages_max)
        self._queues: dict[Priority, deque[PageRun]] = {priority: deque() for priority in Priority}
        self._waiters_of_page: dict[int, list[object]] = {}
        self._waiter: dict[object, tuple[Waiter, set[int]]] = {}
        self._in_flight: dict[int, Fetch] = {}
        self._next_request_id = 1
        self._background_cursor = 0
        self._background_in_flight_bytes = 0
        self._settled_pages = 0

    # ---- what happened -------------------------------------------------------------------------

    def fault(self, key: object, pages: Sequence[PageIndex], priority: Priority, now: float) -> FaultAnswer:
        """A thread missed pages. If it has to wait, it comes back from `installed`.

        Raises:
            OverflowError: more than `EngineConfig.waiters_max` threads wait.
        """
        stats = self.stats
        stats.demand_faults += 1
        if priority is Priority.VCPU:
            stats.faults_of_vcpus += 1
        else:
            stats.faults_of_vmm += 1
        missing = {int(page) for page in pages if not self.pages.is_present(page)}
        self.forget(key)
        if not missing:
            stats.faults_on_present += 1
            return FaultAnswer(ready=True)
        if len(self._waiter) >= self.config.waiters_max:
            raise OverflowError(f"more than {self.config.waiters_max} threads wait for pages")
        self.window.fault(now)
        self._waiter[key] = (Waiter(key, priority, now, tuple(pages)), missing)
        removed: list[PageIndex] = []
        for page in missing:
            self._waiters_of_page.setdefault(page, []).append(key)
            if self.pages.state(page) is PageState.REMOVED:
                removed.append(PageIndex(page))
            else:
                self._want(page, priority)
                if priority is Priority.VCPU:
                    self._prefetch_around(page)
        return FaultAnswer(ready=False, zero_pages=tuple(removed))

    def forget(self, key: object) -> None:
        """A thread no longer waits (a kick, or it is gone). Its pages are fetched all the same."""
        entry = self._waiter.pop(key, None)
        if entry is None:
            return
        for page in entry[1]:
            keys = self._waiters_of_page[page]
            keys.remove(key)
            if not keys:
                del self._waiters_of_page[page]

    def hint(self, run: PageRun) -> None:
        """Pages that the guest is expected to need soon: fetched before the background."""
        self._want_run(run, Priority.HINT)

    def removed(self, run: PageRun) -> list[PageIndex]:
        """The guest gave pages back: zero from now on.

        Returns:
            Those of them that a thread waits for; the driver installs zero pages there.
        """
        settled = sum(found.count for found in self.pages.runs(*run, PageState.INSTALLED, PageState.REMOVED))
        self.pages.apply(run.first, run.count, PageInput.REMOVE)
        self._settled_pages += run.count - settled
        self.stats.removed_pages += run.count
        if not self._waiters_of_page:
            return []
        return [PageIndex(page) for page in self._waiters_of_page if run.first <= page < run.end]

    def present(self, run: PageRun) -> None:
        """Pages that are in guest memory already (found in the kernel after a restart)."""
        for absent in list(self.pages.runs(*run, PageState.ABSENT, PageState.WANTED)):
            self.pages.apply(*absent, PageInput.INSTALL)
            self._settled_pages += absent.count

    def arrived(self, extents: Iterable[Extent], done: Iterable[int], now: float) -> list[Install]:
        """A verified answer arrived.

        Args:
            extents: in the order of the answer's data.
            done: request ids that are answered in full.
            now: seconds.

        Returns:
            What to install. Pages that were removed or settled meanwhile, or never asked for, are left out.
        """
        installs: list[Install] = []
        offset = 0
        for run, result in extents:
            page_size = self.layout.region_of_page(run.first).page_size_bytes
            wanted = list(self.pages.runs(run.first, run.count, PageState.IN_FLIGHT))
            self.stats.clipped_pages += run.count - sum(part.count for part in wanted)
            for part in wanted:
                if result is ExtentResult.DATA:
                    installs.append(Install(part, offset + (part.first - run.first) * page_size))
                elif result is ExtentResult.ZERO:
                    installs.extend(self._zero(part))
                else:
                    self.stats.refused_pages += part.count
                    self._lose(part)
            if result is ExtentResult.DATA:
                offset += run.count * page_size
        for request_id in done:
            self._finish_request(request_id, now)
        return installs

    def installed(self, run: PageRun, *, existed: bool = False, zero: bool = False) -> list[Waiter]:
        """Pages are in guest memory now.

        Args:
            run: the pages.
            existed: somebody else had installed them (EEXIST).
            zero: they were installed as zero pages.

        Returns:
            The threads that wait for nothing any more.
        """
        fresh = run.count - sum(found.count for found in self.pages.runs(*run, PageState.INSTALLED, PageState.REMOVED))
        self.pages.apply(run.first, run.count, PageInput.INSTALL)
        self._settled_pages += fresh
        if existed:
            self.stats.existed_pages += run.count
        elif zero:
            self.stats.zero_pages += fresh
        else:
            self.stats.installed_pages += run.count
        if not self._waiters_of_page:
            return []
        pages = range(run.first, run.end)
        if run.count > len(self._waiters_of_page):
            awaited = [page for page in self._waiters_of_page if page in pages]
        else:
            awaited = [page for page in pages if page in self._waiters_of_page]
        woken: list[Waiter] = []
        for page in awaited:
            for key in self._waiters_of_page.pop(page):
                waiter, missing = self._waiter[key]
                missing.discard(page)
                if not missing:
                    del self._waiter[key]
                    woken.append(waiter)
        return woken

    def lost(self, request_ids: Iterable[int] | None = None) -> None:
        """Requests will not be answered (the stream broke, or an answer was refused); None: all of them."""
        for request_id in list(self._in_flight if request_ids is None else request_ids):
            fetch = self._in_flight.pop(request_id, None)
            if fetch is None:
                continue
            if fetch.priority is Priority.BACKGROUND:
                self._background_in_flight_bytes -= fetch.size_bytes
            for run in fetch.runs:
                for part in list(self.pages.runs(*run, PageState.IN_FLIGHT)):
                    self._lose(part)

    # ---- what to send --------------------------------------------------------------------------

    def next_demand(self) -> Fetch | None:
        """One request for all faults that wait now, most urgent first; None: there is none."""
        return self._next_of((Priority.VCPU, Priority.VMM))

    def next_prefetch(self) -> Fetch | None:
        """One request for neighbours and hints; None: there is none, or a demand request is to be sent first."""
        return self._next_of((Priority.NEIGHBOUR, Priority.HINT))

    def next_background(self, now: float) -> Fetch | None:
        """One background request within the window and the bandwidth cap; None: not now, or nothing is left."""
        if self._background_in_flight_bytes >= self.window.size_bytes or not self.rate.allows(now):
            return None
        run = self._scan_background()
        if run is None:
            return None
        self.pages.apply(run.first, run.count, PageInput.SEND, Priority.BACKGROUND)
        size_bytes = run.count * self.layout.region_of_page(run.first).page_size_bytes
        self._background_in_flight_bytes += size_bytes
        self.rate.spend(size_bytes)
        return self._request(Priority.BACKGROUND, [run], size_bytes)

    # ---- what is --------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Every page is installed or removed."""
        return self._settled_pages == self.layout.page_count

    @property
    def settled_pages(self) -> int:
        """Pages that are installed or removed."""
        return self._settled_pages

    @property
    def waiting(self) -> list[Waiter]:
        """The threads that wait, in the order in which they began."""
        return [waiter for waiter, _ in self._waiter.values()]

    @property
    def requests_in_flight(self) -> int:
        return len(self._in_flight)

    # ---- within ----------------------------------------------------------------------------------

    def _want(self, page: int, priority: Priority) -> None:
        before = self.pages.state(page)
        raised = before is PageState.WANTED and priority < self.pages.priority(page)
        self.pages.apply(page, 1, PageInput.WANT, priority)
        if before is PageState.ABSENT or raised:
            self._queues[priority].append(PageRun(PageIndex(page), 1))
        elif before is PageState.IN_FLIGHT:
            self.stats.faults_on_flight += 1
            # A background or prefetch request that is on its way is not overtaken by a second fetch of
            # the same page (at most one in flight); its answer is at most one window away.

    def _want_run(self, run: PageRun, priority: Priority) -> None:
        for absent in list(self.pages.runs(*run, PageState.ABSENT)):
            self.pages.apply(*absent, PageInput.WANT, priority)
            self._queues[priority].append(absent)

    def _prefetch_around(self, page: int) -> None:
        region = self.layout.region_of_page(page)
        run = self.neighbours.fault(page - region.first_page, region.page_count)
        if run is not None:
            self._want_run(PageRun(PageIndex(run.first + region.first_page), run.count), Priority.NEIGHBOUR)

    def _next_of(self, priorities: tuple[Priority, ...]) -> Fetch | None:
        """Drains queues into one request. Entries whose pages moved on since are skipped."""
        room = self.config.demand_pages_max
        runs: list[PageRun] = []
        size_bytes = 0
        urgent: Priority | None = None
        for priority in priorities:
            queue = self._queues[priority]
            while queue and room:
                entry = queue.popleft()
                if entry.count > room:
                    queue.appendleft(PageRun(PageIndex(entry.first + room), entry.count - room))
                    entry = PageRun(entry.first, room)
                for wanted in list(self.pages.runs(*entry, PageState.WANTED)):
                    self.pages.apply(*wanted, PageInput.SEND, priority)
                    for region, part in self.layout.split(*wanted):
                        runs.append(part)
                        size_bytes += part.count * region.page_size_bytes
                    room -= wanted.count
                    urgent = urgent or priority
        if urgent is None:
            return None
        return self._request(urgent, runs, size_bytes)

    def _request(self, priority: Priority, runs: list[PageRun], size_bytes: int) -> Fetch:
        fetch = Fetch(self._next_request_id, priority, tuple(runs), size_bytes)
        self._next_request_id += 1
        self._in_flight[fetch.request_id] = fetch
        self.stats.requests_by_priority[priority] += 1
        return fetch

    def _finish_request(self, request_id: int, now: float) -> None:
        fetch = self._in_flight.pop(request_id, None)
        if fetch is not None and fetch.priority is Priority.BACKGROUND:
            self._background_in_flight_bytes -= fetch.size_bytes
            self.window.arrived(fetch.size_bytes, now)

    def _scan_background(self) -> PageRun | None:
        """The next absent run after the cursor, wrapping round once; never across a region border."""
        for start, limit in ((self._background_cursor, self.layout.page_count), (0, self._background_cursor)):
            first = self.pages.next_absent(start, limit, 1)
            if first is None:
                continue
            region = self.layout.region_of_page(first.first)
            count_max = max(1, self.config.batch_bytes_max // region.page_size_bytes)
            run = self.pages.next_absent(first.first, min(limit, region.end_page), count_max)
            assert run is not None
            self._background_cursor = run.end % self.layout.page_count
            return run
        return None

    def _zero(self, run: PageRun) -> list[Install]:
        """Pages that the source says are zero: awaited ones are installed, the rest stay holes."""
        awaited = sorted(page for page in self._waiters_of_page if run.first <= page < run.end)
        installs = [Install(PageRun(PageIndex(page), 1), -1) for page in awaited]
        first = int(run.first)
        for page in [*awaited, run.end]:
            if page > first:
                self.pages.apply(first, page - first, PageInput.ZERO)
                self._settled_pages += page - first
                self.stats.zero_pages += page - first
            first = page + 1
        return installs

    def _lose(self, run: PageRun) -> None:
        self.stats.lost_pages += run.count
        first = int(run.first)
        awaited = sorted(page for page in self._waiters_of_page if run.first <= page < run.end)
        for page in [*awaited, run.end]:
            if page > first:
                self.pages.apply(first, page - first, PageInput.LOSE_IDLE)
            if page < run.end:
                self.pages.apply(page, 1, PageInput.LOSE)
                priority = Priority(self.pages.priority(page))
                self._queues[priority].append(PageRun(PageIndex(page), 1))
            first = page + 1
