"""The fault engine: faults, arrivals and losses in; requests, installs and woken waiters out.

It does no I/O and reads no clock. A driver

1. tells it what happened: `fault`, `removed`, `present`, `arrived`, `installed`, `not_installed`, `lost`;
2. asks what to send: `next_demand`, `next_prefetch`, `next_background`, until they return None;
3. installs what `arrived` returns, then says `installed` and restarts the waiters that come back. If events
   came in between, it first asks `to_install` what is left of a run: a page may have been removed. What another
   process has installed it says with `placed`.

Promises: at most one fetch per page is in flight; a fault on a page in flight raises its priority and
waits; an arrival is clipped to what is still wanted, and wanted once; a removed page is never fetched; a
request that is answered in part is asked again for the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine.background_order import BackgroundOrder
from farfault_client.engine.demand_queue import DemandQueue
from farfault_client.engine.neighbours import DEPTH_MAX_PAGES, NeighbourPrefetch
from farfault_client.engine.orders import EngineStats, Extent, ExtentResult, FaultAnswer, Fetch, Install
from farfault_client.engine.page_map import PageMap
from farfault_client.engine.rate import RateLimit
from farfault_client.engine.states import PageInput, PageState, Priority
from farfault_client.engine.waiters import Waiter, Waiters
from farfault_client.engine.way import Departure
from farfault_client.engine.window import BackgroundWindow

NEIGHBOUR_RUNS_MAX: Final = 1024
"""Neighbours that wait to be fetched; the oldest are dropped, as the guest has moved on."""
LONE_BYTES_MAX: Final = 64 << 10
"""A larger page takes so long on its way that what its fault costs does not matter."""
LONE_AT_ONCE_MAX: Final = 64
"""Lone faults that are requested before the engine is told of the first: TAKEN_MAX of `client/native/lone_faults.c`."""
REFUSAL_PAUSE_S: Final = 0.05
"""The background lane rests this long after a refusal, so that a refusing server is not hammered."""

# Bound once: looking up a member of an enum costs as much as a bytes search.
_WANT, _SEND, _ARRIVE, _INSTALL = PageInput.WANT, PageInput.SEND, PageInput.ARRIVE, PageInput.INSTALL
_PLACE = PageInput.PLACE
_ABSENT, _WANTED, _IN_FLIGHT = PageState.ABSENT, PageState.WANTED, PageState.IN_FLIGHT
_REMOVED = PageState.REMOVED
_VCPU = Priority.VCPU
_ZERO, _REFUSED = ExtentResult.ZERO, ExtentResult.REFUSED
_READY, _WAITS = FaultAnswer(True), FaultAnswer(False)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Bounds of the engine.

    Attributes:
        demand_pages_max: pages in one demand request.
        demand_bytes_max: bytes in one demand request; one page is always allowed.
        batch_bytes_max: bytes in one background request; one page is always allowed.
        prefetch_bytes_max: bytes in one request for neighbours; one page is always allowed.
        neighbour_pages_max: longest neighbour prefetch; 0 turns it off. Pages that do not fit twice into
            `prefetch_bytes_max` (2 MiB, 1 GiB) have no neighbours.
        background_bytes_per_s: cap of the background lane; 0: none. Demand is never capped.
        waiters_max: threads that may wait at one time.
    """

    demand_pages_max: int = 256
    demand_bytes_max: int = 1 << 20
    batch_bytes_max: int = 1 << 20
    prefetch_bytes_max: int = 512 << 10
    neighbour_pages_max: int = DEPTH_MAX_PAGES
    background_bytes_per_s: int = 0
    waiters_max: int = 65536


class FaultEngine:
    """Sans-I/O core of the pager.

    Args:
        layout: guest memory.
        config: bounds.
        pages: the state of every page, all ABSENT; None: a map of its own.

    Attributes:
        pages: the state of every page.
        window: credit of the background lane.
        rate: its bandwidth cap; ``rate.bytes_per_s`` may change at any time.
    """

    def __init__(self, layout: Layout, config: EngineConfig | None = None, pages: PageMap | None = None) -> None:
        self.layout = layout
        self.config = config or EngineConfig()
        self.pages = pages or PageMap(layout.page_count)
        self.stats = EngineStats()
        self.window = BackgroundWindow(batch_bytes_max=self.config.batch_bytes_max)
        self.rate = RateLimit(self.config.background_bytes_per_s)
        self.neighbours = NeighbourPrefetch(self.config.neighbour_pages_max)
        self._waiters = Waiters()
        self._demand = {Priority.VCPU: DemandQueue(), Priority.VMM: DemandQueue()}
        self._of_vcpus, self._of_vmm = self._demand[Priority.VCPU].waiting, self._demand[Priority.VMM].waiting
        self._neighbour_runs: deque[PageRun] = deque(maxlen=NEIGHBOUR_RUNS_MAX)
        self._order = BackgroundOrder(layout, self.pages)
        self._in_flight: dict[int, Fetch] = {}
        self._departures: dict[int, Departure] = {}  # of background requests
        self._data_bytes = 0  # came with data since the last background request was answered
        self._background_in_flight_bytes = 0
        self._background_rests_until = float("-inf")
        self._next_request_id = 1
        sizes = {region.page_size_bytes for region in layout.regions}
        self._only_page_bytes = sizes.pop() if len(sizes) == 1 else 0
        self._only_region = layout.regions[0] if len(layout.regions) == 1 else None

    # ---- what happened -------------------------------------------------------------------------

    def fault(
        self, key: object, pages: Sequence[PageIndex], priority: Priority, now: float, who: object = None
    ) -> FaultAnswer:
        """A thread missed pages. If it has to wait, it comes back from `installed`.

        Args:
            key: of the thread; a second fault of the same key replaces the first.
            pages: that must all be present before it goes on.
            priority: VCPU or VMM.
            now: seconds.
            who: the vCPU whose way through memory this fault belongs to, where the key does not say; None: it does.

        Raises:
            OverflowError: more than `EngineConfig.waiters_max` threads wait.
        """
        stats, page_map = self.stats, self.pages
        self._count_fault(priority)
        if key in self._waiters:
            self.forget(key)
        is_present = page_map.is_present
        missing = {page for page in pages if not is_present(page)}
        if not missing:
            stats.faults_on_present += 1
            return _READY
        if len(self._waiters) >= self.config.waiters_max:
            raise OverflowError(f"more than {self.config.waiters_max} threads wait for pages")
        self.window.fault(now)
        self._waiters.add(Waiter(key, priority, now, tuple(pages)), missing)
        removed: list[PageIndex] = []
        for page in missing:
            state = page_map.state(page)
            if state is _REMOVED:
                removed.append(page)
                continue
            page_map.apply(page, 1, _WANT, priority)
            if state is _ABSENT or state is _WANTED:
                self._demand[priority].add(key, page)
            else:
                # A request on its way is not overtaken by a second fetch of the same page; its answer is at
                # most one window away, and the window has just begun to shrink.
                stats.faults_on_flight += 1
        if priority is _VCPU:
            self._prefetch_around(key if who is None else who, pages[-1])
        return FaultAnswer(False, tuple(removed)) if removed else _WAITS

    @property
    def takes_lone(self) -> bool:
        """A request may be sent for an ABSENT page that one thread missed, before the engine is told (`lone_fault`)."""
        return not (self._of_vcpus or self._of_vmm) and len(self._waiters) + LONE_AT_ONCE_MAX <= self.config.waiters_max

    @property
    def next_request_id(self) -> int:
        """Of the next request; those after it follow."""
        return self._next_request_id

    def waits(self, key: object) -> bool:
        """A thread waits for pages."""
        return key in self._waiters

    def lone_fault(self, key: object, page: PageIndex, priority: Priority, now: float) -> Fetch | None:
        """A thread missed one page: `fault` and `next_demand` at once, in the commonest case.

        The request may have been sent already, with `next_request_id`: while `takes_lone`, and for a page that is
        ABSENT and not large, and a thread that does not wait, the answer is known.

        Args:
            key, page, priority, now: as of `fault`.

        Returns:
            The request to send, for this page and nothing else; say `went` when it is sent. None: it is no such case
            (the page is large or no longer absent, other faults wait to be sent), and nothing has changed; say `fault`.
        """
        if not self.pages.is_absent(page) or key in self._waiters or self.demand_waits:
            return None
        size_bytes = self._page_bytes(page)
        if size_bytes > LONE_BYTES_MAX or len(self._waiters) >= self.config.waiters_max:
            return None
        self._count_fault(priority)
        self.pages.apply(page, 1, _SEND, priority)
        self._waiters.add(Waiter(key, priority, now, (page,)), {page})
        return self._request(priority, [PageRun(page, 1)], size_bytes)

    def went(self, who: object, page: PageIndex, priority: Priority, now: float) -> bool:
        """The request of a `lone_fault` is taken account of.

        Args:
            who, page, priority, now: as of `fault`.

        Returns:
            True if `next_prefetch` has something now.
        """
        self.window.fault(now)
        if priority is _VCPU:
            self._prefetch_around(who, page)
        return bool(self._neighbour_runs)

    def awaits(self, request_id: int, page: PageIndex) -> bool:
        """A request is under way, and the page that came for it may be put into memory at first hand, before the engine
        is told (`lone_installed`). Whoever does so looks at the page's state by himself."""
        return request_id in self._in_flight and self.pages.state(page) is _IN_FLIGHT

    def lone_installed(self, request_id: int, page: PageIndex) -> list[Waiter]:
        """The page of a `lone_fault` came and is in guest memory: `arrived` and `installed` at once.

        Returns:
            As `installed`.
        """
        self._in_flight.pop(request_id, None)
        self._data_bytes += self._page_bytes(page)
        self.stats.installed_pages += self.pages.apply(page, 1, _INSTALL)
        return self._waiters.wake((page,)) if self._waiters.is_awaited(page) else []  # a kick may have come in between

    def forget(self, key: object) -> None:
        """A thread no longer waits (a kick, or it is gone). Its pages are fetched all the same."""
        waiter = self._waiters.forget(key)
        if waiter is not None:
            self._demand[waiter.priority].forget(key)

    def hint(self, run: PageRun) -> bool:
        """Pages that the guest is expected to need soon: the background fetches them first, in this order.

        Returns:
            False if too many hints wait already; the pages come with the rest.
        """
        return self._order.hint(run)

    def removed(self, run: PageRun) -> list[PageIndex]:
        """The guest gave pages back: zero from now on.

        Returns:
            Those of them that a thread waits for; the driver installs zero pages there.
        """
        self.pages.apply(run.first, run.count, PageInput.REMOVE)
        self.stats.removed_pages += run.count
        return [PageIndex(page) for page in self._waiters.awaited(run)]

    def present(self, run: PageRun) -> list[Waiter]:
        """Pages that are in guest memory already (found in the kernel after a restart).

        Returns:
            As `installed`.
        """
        woken: list[Waiter] = []
        for part in self.pages.runs(*run, _ABSENT, _WANTED):
            self.pages.apply(*part, _INSTALL)
            woken.extend(self._waiters.wake(self._waiters.awaited(part)))
        return woken

    def arrived(self, extents: Iterable[Extent], done: Iterable[int], now: float) -> list[Install]:
        """A verified answer arrived.

        Args:
            extents: in the order of the answer's data.
            done: request ids that are answered in full. What they asked for and nobody sent is asked for again.
            now: seconds.

        Returns:
            What to install. Pages that were removed or settled meanwhile, that were never asked for, or that
            an earlier extent brought already, are left out.
        """
        pages = self.pages
        installs: list[Install] = []
        offset = 0
        for run, result in extents:
            if result is _REFUSED:
                self.stats.refused_pages += run.count  # they are asked for again when their request is done
                self._background_rests_until = now + REFUSAL_PAUSE_S
                continue
            if run.count > 1:
                wanted = pages.runs(run.first, run.count, _IN_FLIGHT)
            else:
                wanted = [run] if pages.state(run.first) is _IN_FLIGHT else []
            if result is _ZERO:
                for part in wanted:
                    self._zero(part, installs)
            else:
                page_size = self._page_bytes(run.first)
                self._data_bytes += run.count * page_size
                for part in wanted:
                    pages.apply(part.first, part.count, _ARRIVE)
                    installs.append(Install(part, offset + (part.first - run.first) * page_size))
                offset += run.count * page_size
            if len(wanted) != 1 or wanted[0].count != run.count:
                self.stats.clipped_pages += run.count - sum(part.count for part in wanted)
        for request_id in done:
            self._finish_request(request_id, now)
        return installs

    def to_install(self, run: PageRun) -> list[PageRun]:
        """What is left to install of a run that `arrived` ordered: not the pages that were removed since."""
        return self.pages.runs(*run, PageState.ARRIVED)

    def installed(self, run: PageRun, *, existed: bool = False, zero: bool = False) -> list[Waiter]:
        """Pages are in guest memory now.

        Args:
            run: the pages.
            existed: somebody else had installed them (EEXIST).
            zero: they were installed as zero pages.

        Returns:
            The threads that wait for nothing any more.
        """
        fresh = self.pages.apply(run.first, run.count, _INSTALL)
        if existed:
            self.stats.existed_pages += run.count
        elif zero:
            self.stats.zero_pages += fresh
        else:
            self.stats.installed_pages += fresh
        awaited = self._waiters.awaited(run)
        return self._waiters.wake(awaited) if awaited else []

    def placed(self, run: PageRun, *, existed: bool = False) -> list[Waiter]:
        """Another process has put pages that were in flight into guest memory, or found them there (`existed`).

        It looked at `pages` before; those that were removed after that stay so.

        Returns:
            As `installed`.
        """
        first, count = run
        self._data_bytes += count * self._page_bytes(first)
        fresh = self.pages.apply(first, count, _PLACE)
        if existed:
            self.stats.existed_pages += fresh
        else:
            self.stats.installed_pages += fresh
        awaited = self._waiters.awaited(run)
        return self._waiters.wake(page for page in awaited if self.pages.is_present(page)) if awaited else []

    def not_installed(self, run: PageRun) -> None:
        """Pages that `arrived` ordered could not be installed: they are fetched again."""
        for part in self.pages.runs(*run, PageState.ARRIVED):
            self._lose(part)
            for request_id, fetch in self._in_flight.items():  # one that goes on brings them no second time
                self._in_flight[request_id] = fetch._replace(runs=_without(fetch.runs, part))

    def lost(self, request_ids: Iterable[int] | None = None) -> None:
        """Requests will not be answered (the stream broke, or an answer was refused); None: all of them."""
        background_lost = False
        for request_id in list(self._in_flight if request_ids is None else request_ids):
            fetch = self._in_flight.pop(request_id, None)
            if fetch is None:
                continue
            if self._departures.pop(request_id, None) is not None:
                background_lost = True
                self._background_in_flight_bytes -= fetch.size_bytes
            self._lose_unanswered(fetch)
        if background_lost:
            self.window.lost()

    # ---- what to send --------------------------------------------------------------------------

    def next_demand(self) -> Fetch | None:
        """One request for all faults that wait now, vCPUs' first; None: there is none.

        A request that is full takes a page of each thread in turn; the rest is in the next one.
        """
        pages_left, bytes_left = self.config.demand_pages_max, self.config.demand_bytes_max
        page_map, page_bytes = self.pages, self._page_bytes
        runs: list[PageRun] = []
        urgent: Priority | None = None
        for priority, queue in self._demand.items():
            if not queue.waiting or pages_left <= 0 or bytes_left <= 0:
                continue
            taken: list[int] = []
            for page in queue.take():
                if page_map.state(page) is not _WANTED:
                    continue  # it was asked for, or settled, since
                page_map.apply(page, 1, _SEND, priority)
                taken.append(page)
                bytes_left -= page_bytes(page)
                if len(taken) == pages_left or bytes_left <= 0:
                    break
            if taken:
                pages_left -= len(taken)
                runs += self._runs_of(taken)
                urgent = urgent or priority
        if urgent is None:
            return None
        return self._request(urgent, runs, self.config.demand_bytes_max - bytes_left)

    def next_prefetch(self) -> Fetch | None:
        """One request for neighbours of faults, at most a batch; None: there is none."""
        runs: list[PageRun] = []
        size_bytes = 0
        while self._neighbour_runs and size_bytes < self.config.prefetch_bytes_max:
            run = self._neighbour_runs.popleft()
            page_size = self._page_bytes(run.first)
            room = max(1, (self.config.prefetch_bytes_max - size_bytes) // page_size)
            absent = self.pages.next_absent(run.first, run.end, room)
            if absent is None:
                continue
            if absent.end < run.end:
                self._neighbour_runs.appendleft(PageRun(PageIndex(absent.end), run.end - absent.end))
            self.pages.apply(*absent, _SEND, Priority.NEIGHBOUR)
            self.stats.prefetched_pages += absent.count
            runs.append(absent)
            size_bytes += absent.count * page_size
        return self._request(Priority.NEIGHBOUR, runs, size_bytes) if runs else None

    def next_background(self, now: float) -> Fetch | None:
        """One request for hinted pages, or else for the rest, within the window and the bandwidth cap.

        Returns:
            None: not now (ask again after an arrival, or in a few milliseconds), or nothing is left.
        """
        if not self.pages.total(_ABSENT) or now < self._background_rests_until:
            return None
        if not self.window.allows(self._background_in_flight_bytes) or not self.rate.allows(now):
            return None
        priority, runs, size_bytes = self._background_runs()
        fetch = self._request(priority, runs, size_bytes)
        self._departures[fetch.request_id] = self.window.sent(self._background_in_flight_bytes, now)
        self._background_in_flight_bytes += size_bytes
        self.rate.spend(size_bytes)
        return fetch

    # ---- what is --------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Every page is installed or removed."""
        return self.pages.settled_pages == self.layout.page_count

    @property
    def settled_pages(self) -> int:
        """Pages that are installed or removed."""
        return self.pages.settled_pages

    @property
    def waiting(self) -> list[Waiter]:
        """The threads that wait, in the order in which they began."""
        return self._waiters.all()

    @property
    def demand_waits(self) -> bool:
        """`next_demand` may have a request: after a loss, or an answer that left awaited pages out."""
        return bool(self._of_vcpus or self._of_vmm)

    @property
    def requests_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def background_in_flight_bytes(self) -> int:
        """Bytes asked for by `next_background` and not answered yet; at most the window and one batch."""
        return self._background_in_flight_bytes

    # ---- within ----------------------------------------------------------------------------------

    def _count_fault(self, priority: Priority) -> None:
        stats = self.stats
        stats.demand_faults += 1
        if priority is _VCPU:
            stats.faults_of_vcpus += 1
        else:
            stats.faults_of_vmm += 1

    def _prefetch_around(self, who: object, page: int) -> None:
        region = self._only_region or self.layout.region_of_page(page)
        if region.page_size_bytes * 2 > self.config.prefetch_bytes_max:
            return
        page -= region.first_page
        guess = self.neighbours.fault(who, page, region.page_count)
        if not guess:
            return
        for run in guess:
            self._neighbour_runs.append(PageRun(PageIndex(run.first + region.first_page), run.count))
        edge = self.neighbours.goes_on_at(page, guess)
        if edge is not None and edge < region.page_count:
            self._order.follow(region.first_page + edge, self.window.size_bytes // region.page_size_bytes)

    def _background_runs(self) -> tuple[Priority, list[PageRun], int]:
        """A batch of absent pages, in flight from now on."""
        priority, runs, pages = Priority.BACKGROUND, [], 0
        for run, priority in self._order.next_runs(self.window.batch_bytes):
            self.pages.apply(*run, _SEND, priority)
            runs.append(run)
            pages += run.count
        assert runs, "some page is absent"
        return priority, runs, pages * self._page_bytes(runs[0].first)

    def _runs_of(self, pages: list[int]) -> list[PageRun]:
        """Pages as runs that do not cross a region border."""
        if len(pages) == 1:
            return [PageRun(PageIndex(pages[0]), 1)]
        pages.sort()
        runs: list[PageRun] = []
        first = before = pages[0]
        for page in [*pages[1:], -1]:
            if page != before + 1:
                runs.extend(part for _, part in self.layout.split(first, before + 1 - first))
                first = page
            before = page
        return runs

    def _request(self, priority: Priority, runs: list[PageRun], size_bytes: int) -> Fetch:
        fetch = Fetch(self._next_request_id, priority, tuple(runs), size_bytes)
        self._next_request_id += 1
        self._in_flight[fetch.request_id] = fetch
        self.stats.requests_by_priority[priority] += 1
        return fetch

    def _finish_request(self, request_id: int, now: float) -> None:
        fetch = self._in_flight.pop(request_id, None)
        if fetch is None:
            return
        departure = self._departures.pop(request_id, None)
        if departure is not None:
            self._background_in_flight_bytes -= fetch.size_bytes
            data_bytes, self._data_bytes = self._data_bytes, 0
            self.window.arrived(fetch.size_bytes, data_bytes, now, departure)
        self._lose_unanswered(fetch)

    def _lose_unanswered(self, fetch: Fetch) -> None:
        for run in fetch.runs:
            if run.count == 1 and self.pages.state(run.first) is not _IN_FLIGHT:
                continue  # the common case
            for part in self.pages.runs(*run, _IN_FLIGHT):
                self._lose(part)

    def _lose(self, run: PageRun) -> None:
        """Pages in flight or arrived come to nothing: awaited ones are wanted again, the rest are absent."""
        self.stats.lost_pages += run.count
        first = int(run.first)
        for page in [*self._waiters.awaited(run), run.end]:
            if page > first:
                self.pages.apply(first, page - first, PageInput.LOSE_IDLE)
            waiter = self._waiters.of_page(page) if page < run.end else None
            if waiter is not None:
                self.pages.apply(page, 1, PageInput.LOSE)
                self._demand[waiter.priority].add(waiter.key, page)
            first = page + 1

    def _zero(self, run: PageRun, installs: list[Install]) -> None:
        """Pages that the source says are zero: awaited ones are installed, the rest stay holes."""
        first = int(run.first)
        for page in [*self._waiters.awaited(run), run.end]:
            if page > first:
                self.pages.apply(first, page - first, PageInput.ZERO)
                self.stats.zero_pages += page - first
            if page < run.end:
                self.pages.apply(page, 1, _ARRIVE)
                installs.append(Install(PageRun(PageIndex(page), 1), -1))
            first = page + 1

    def _page_bytes(self, page: int) -> int:
        return self._only_page_bytes or self.layout.region_of_page(page).page_size_bytes


def _without(runs: Sequence[PageRun], left_out: PageRun) -> tuple[PageRun, ...]:
    """Runs less the pages of another."""
    kept: list[PageRun] = []
    for run in runs:
        before, after = min(run.end, left_out.first), max(run.first, left_out.end)
        if before > run.first:
            kept.append(PageRun(run.first, before - run.first))
        if run.end > after:
            kept.append(PageRun(PageIndex(after), run.end - after))
    return tuple(kept)
