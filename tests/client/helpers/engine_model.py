"""A fault engine that is obviously right: one Python object a page, every rule spelled out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from farfault_client.engine import Extent, ExtentResult, FaultEngine, Fetch, Install, PageState, Priority
from farfault_shim.layout import PageIndex, PageRun


@dataclass
class ModelPage:
    state: PageState = PageState.ABSENT
    priority: int = 0
    request_id: int = 0


@dataclass
class Model:
    """Follows an engine step by step; `step` methods assert that the engine did what it had to.

    The model does not choose what to send: it checks each choice against the rules.
    """

    engine: FaultEngine
    pages: list[ModelPage] = field(default_factory=list)
    waiters: dict[object, set[int]] = field(default_factory=dict)
    priorities: dict[object, Priority] = field(default_factory=dict)
    requests: dict[int, Fetch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pages = [ModelPage() for _ in range(self.engine.layout.page_count)]

    # ---- inputs ----------------------------------------------------------------------------------

    def fault(self, key: object, pages: list[int], priority: Priority, now: float) -> tuple[PageIndex, ...]:
        """Returns the zero pages that the driver has to install."""
        answer = self.engine.fault(key, [PageIndex(page) for page in pages], priority, now)
        self._forget(key)
        missing = {page for page in pages if self.pages[page].state is not PageState.INSTALLED}
        assert answer.ready == (not missing)
        assert set(answer.zero_pages) == {page for page in missing if self.pages[page].state is PageState.REMOVED}
        if missing:
            self.waiters[key] = missing
            self.priorities[key] = priority
            for page in missing:
                mine = self.pages[page]
                if mine.state is PageState.ABSENT:
                    mine.state, mine.priority = PageState.WANTED, priority
                elif mine.priority:
                    mine.priority = min(mine.priority, priority)
        self.check()
        return answer.zero_pages

    def lone_fault(self, key: object, page: int, priority: Priority, now: float) -> Fetch | None:
        """None: it goes the long way, and nothing has happened."""
        mine = self.pages[page]
        waits = {page for pages in self.waiters.values() for page in pages}
        may = (
            mine.state is PageState.ABSENT
            and key not in self.waiters
            and not any(self.pages[other].state is PageState.WANTED for other in waits)
        )
        fetch = self.sent(self.engine.lone_fault(key, PageIndex(page), priority, now))
        if fetch is not None:
            assert may
            assert fetch.runs == (PageRun(PageIndex(page), 1),)
            assert fetch.priority == mine.priority == priority
            self.waiters[key] = {page}
            self.priorities[key] = priority
        self.check()
        return fetch

    def lone_installed(self, fetch: Fetch) -> set[object]:
        """The answer to a lone fault came and was installed at once."""
        page = fetch.runs[0].first
        assert self.engine.awaits(fetch.request_id, page)
        woken = {waiter.key for waiter in self.engine.lone_installed(fetch.request_id, page)}
        del self.requests[fetch.request_id]
        self._installed([page], woken)
        return woken

    def forget(self, key: object) -> None:
        self.engine.forget(key)
        self._forget(key)
        self.check()

    def _forget(self, key: object) -> None:
        self.waiters.pop(key, None)

    def sent(self, fetch: Fetch | None) -> Fetch | None:
        """Any request of the engine's."""
        if fetch is None:
            return None
        assert fetch.request_id not in self.requests
        assert fetch.runs
        size = 0
        for run in fetch.runs:
            region = self.engine.layout.region_of_page(run.first)
            assert run.count >= 1
            assert run.end <= region.end_page, "a run does not cross a region border"
            size += run.count * region.page_size_bytes
            for page in range(run.first, run.end):
                mine = self.pages[page]
                assert mine.state in (PageState.ABSENT, PageState.WANTED), "fetched twice at once"
                mine.state, mine.request_id = PageState.IN_FLIGHT, fetch.request_id
                mine.priority = mine.priority or fetch.priority
        assert size == fetch.size_bytes
        self.requests[fetch.request_id] = fetch
        return fetch

    def next_demand(self) -> Fetch | None:
        fetch = self.sent(self.engine.next_demand())
        waiting = {page for pages in self.waiters.values() for page in pages}
        if fetch is None:
            assert not any(self.pages[page].state is PageState.WANTED for page in waiting), "a fault is left behind"
        self.check()
        return fetch

    def arrived(self, extents: list[Extent], done: list[int], now: float) -> list[Install]:
        installs = self.engine.arrived(extents, done, now)
        expected: list[tuple[int, int]] = []
        offset = 0
        awaited = {page for pages in self.waiters.values() for page in pages}
        for run, result in extents:
            size = self.engine.layout.region_of_page(run.first).page_size_bytes
            for page in range(run.first, run.end):
                mine = self.pages[page]
                if mine.state is PageState.IN_FLIGHT and result is not ExtentResult.REFUSED:
                    if result is ExtentResult.ZERO and page not in awaited:
                        mine.state, mine.priority = PageState.REMOVED, 0
                    else:
                        mine.state = PageState.ARRIVED
                        zero = result is ExtentResult.ZERO
                        expected.append((page, -1 if zero else offset + (page - run.first) * size))
            if result is ExtentResult.DATA:
                offset += run.count * size
        flat = [pair for install in installs for pair in _each(self.engine, install)]
        assert flat == expected
        for request_id in done:
            self.lost_in_model(request_id)
        self.check()
        return installs

    def lost_in_model(self, request_id: int) -> None:
        self.requests.pop(request_id, None)
        awaited = {page for pages in self.waiters.values() for page in pages}
        for page, mine in enumerate(self.pages):
            if mine.state is PageState.IN_FLIGHT and mine.request_id == request_id:
                self._lose(mine, page in awaited)

    def _lose(self, mine: ModelPage, is_awaited: bool) -> None:
        mine.state = PageState.WANTED if is_awaited else PageState.ABSENT
        if not is_awaited:
            mine.priority = 0

    def lost(self, request_ids: list[int] | None) -> None:
        self.engine.lost(request_ids)
        for request_id in list(self.requests) if request_ids is None else request_ids:
            self.lost_in_model(request_id)
        self.check()

    def installed(self, run: PageRun, *, existed: bool = False, zero: bool = False) -> set[object]:
        woken = {waiter.key for waiter in self.engine.installed(run, existed=existed, zero=zero)}
        self._installed(range(run.first, run.end), woken)
        return woken

    def placed(self, run: PageRun) -> set[object]:
        """Another process installed what was in flight; removals since stand."""
        pages = [page for page in range(run.first, run.end) if self.pages[page].state is not PageState.REMOVED]
        woken = {waiter.key for waiter in self.engine.placed(run)}
        self._installed(pages, woken)
        return woken

    def _installed(self, pages: Iterable[int], woken: set[object]) -> None:
        for page in pages:
            mine = self.pages[page]
            mine.state, mine.priority = PageState.INSTALLED, 0
            for missing in self.waiters.values():
                missing.discard(page)
        free = {key for key, missing in self.waiters.items() if not missing}
        assert woken == free, "exactly those whose pages are all present are woken"
        for key in free:
            del self.waiters[key]
        self.check()

    def not_installed(self, run: PageRun) -> None:
        self.engine.not_installed(run)
        awaited = {page for pages in self.waiters.values() for page in pages}
        for page in range(run.first, run.end):
            if self.pages[page].state is PageState.ARRIVED:
                self._lose(self.pages[page], page in awaited)
        self.check()

    def removed(self, run: PageRun) -> list[PageIndex]:
        """Returns the pages that the driver has to install as zero."""
        awaited = {page for pages in self.waiters.values() for page in pages}
        zero = self.engine.removed(run)
        assert sorted(zero) == sorted(page for page in awaited if run.first <= page < run.end)
        for page in range(run.first, run.end):
            self.pages[page].state, self.pages[page].priority = PageState.REMOVED, 0
        self.check()
        return zero

    # ---- always ------------------------------------------------------------------------------------

    def check(self) -> None:
        engine = self.engine
        settled = 0
        for page, mine in enumerate(self.pages):
            assert engine.pages.state(page) is mine.state, f"page {page}"
            if mine.state in (PageState.WANTED, PageState.IN_FLIGHT):
                assert engine.pages.priority(page) == mine.priority, f"page {page}"
            settled += mine.state in (PageState.INSTALLED, PageState.REMOVED)
        assert engine.settled_pages == settled
        assert engine.finished == (settled == len(self.pages))
        assert {waiter.key for waiter in engine.waiting} == set(self.waiters)
        assert engine.requests_in_flight == len(self.requests)
        for state in PageState:
            assert engine.pages.total(state) == sum(mine.state is state for mine in self.pages)


def _each(engine: FaultEngine, install: Install) -> list[tuple[int, int]]:
    """An order, page by page."""
    size = engine.layout.region_of_page(install.run.first).page_size_bytes
    step = 0 if install.data_offset < 0 else size
    return [(install.run.first + index, install.data_offset + index * step) for index in range(install.run.count)]
