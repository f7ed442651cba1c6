"""The engine against a naive model: random programs, and every short program of a tiny guest."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from engine_model import Model
from farfault_client.engine import EngineConfig, Extent, ExtentResult, FaultEngine, PageState, Priority
from farfault_client.engine.engine import REFUSAL_PAUSE_S
from farfault_shim.layout import Layout, PageIndex, PageRun
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

PAGE, HUGE = 4096, 2 << 20
DATA, ZERO, REFUSED = ExtentResult.DATA, ExtentResult.ZERO, ExtentResult.REFUSED


def run(first: int, count: int = 1) -> PageRun:
    return PageRun(PageIndex(first), count)


class EngineMachine(RuleBasedStateMachine):
    """Faults, arrivals, losses and removals in any order."""

    LAYOUT = Layout([(10 * PAGE, PAGE), (3 * HUGE, HUGE), (7 * PAGE, PAGE)])
    KEYS = st.integers(0, 4)
    PAGES = st.integers(0, LAYOUT.page_count - 1)
    COUNTS = st.integers(1, LAYOUT.page_count)
    PRIORITIES = st.sampled_from([Priority.VCPU, Priority.VMM])

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        config = EngineConfig(demand_pages_max=4, batch_bytes_max=4 * PAGE)
        self.model = Model(FaultEngine(self.LAYOUT, config))

    def _zero(self, pages: object) -> None:
        for page in pages:  # type: ignore[attr-defined]
            self.model.installed(run(page), zero=True)

    @rule(key=KEYS, pages=st.lists(PAGES, min_size=1, max_size=6, unique=True), priority=PRIORITIES)
    def fault(self, key: int, pages: list[int], priority: Priority) -> None:
        self._zero(self.model.fault(key, pages, priority, self.now))

    @rule(key=KEYS, page=PAGES, priority=PRIORITIES)
    def lone_fault(self, key: int, page: int, priority: Priority) -> None:
        self.model.lone_fault(key, page, priority, self.now)

    @rule(data=st.data())
    def lone_answer(self, data: st.DataObject) -> None:
        lone = [
            request_id
            for request_id, fetch in self.model.requests.items()
            if [part.count for part in fetch.runs] == [1]
            and self.model.pages[fetch.runs[0].first].request_id == request_id
            and self.model.engine.awaits(request_id, fetch.runs[0].first)
            and fetch.priority <= Priority.VMM
        ]
        if lone:
            self.model.lone_installed(self.model.requests[data.draw(st.sampled_from(lone))])

    @rule(first=PAGES, count=COUNTS)
    def somebody_else_places(self, first: int, count: int) -> None:
        self.model.placed(run(first, min(count, self.LAYOUT.page_count - first)))

    @rule(key=KEYS)
    def kick(self, key: int) -> None:
        self.model.forget(key)

    @rule(first=PAGES, count=COUNTS)
    def hint(self, first: int, count: int) -> None:
        assert self.model.engine.hint(run(first, min(count, self.LAYOUT.page_count - first)))

    @rule(first=PAGES, count=COUNTS)
    def remove(self, first: int, count: int) -> None:
        self._zero(self.model.removed(run(first, min(count, self.LAYOUT.page_count - first))))

    @rule(first=PAGES)
    def somebody_else_installs(self, first: int) -> None:
        self.model.installed(run(first), existed=True)

    @rule()
    def send_demand(self) -> None:
        self.model.next_demand()

    @rule()
    def send_prefetch(self) -> None:
        self.model.sent(self.model.engine.next_prefetch())

    @rule(step=st.floats(0, 0.1))
    def send_background(self, step: float) -> None:
        self.now += step
        self.model.sent(self.model.engine.next_background(self.now))

    @rule(
        data=st.data(),
        is_done=st.booleans(),
        result=st.sampled_from([DATA, ZERO, REFUSED]),
        install=st.sampled_from(["all", "existed", "fails"]),
    )
    def answer(self, data: st.DataObject, is_done: bool, result: ExtentResult, install: str) -> None:
        """An answer, whole or in part, twice or for pages that nobody asked for."""
        if not self.model.requests:
            return
        fetch = self.model.requests[data.draw(st.sampled_from(sorted(self.model.requests)))]
        runs = data.draw(st.lists(st.sampled_from(fetch.runs), max_size=3))
        extents = [Extent(part, result) for part in runs]
        if data.draw(st.booleans()):
            extents.append(Extent(run(data.draw(self.PAGES)), DATA))
        for order in self.model.arrived(extents, [fetch.request_id] if is_done else [], self.now):
            if install == "fails":
                self.model.not_installed(order.run)
            else:
                self.model.installed(order.run, existed=install == "existed", zero=order.data_offset < 0)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if self.model.requests:
            self.model.lost([data.draw(st.sampled_from(sorted(self.model.requests)))])

    @rule()
    def disconnect(self) -> None:
        self.model.lost(None)

    @invariant()
    def background_is_bounded(self) -> None:
        engine = self.model.engine
        assert 0 <= engine.background_in_flight_bytes <= engine.window.size_bytes + 2 * HUGE

    def teardown(self) -> None:
        """Everything that is left is fetched, and every thread wakes."""
        model = self.model
        for _ in range(1000):
            if model.engine.finished and not model.requests:
                break
            self.now += 1.0
            model.sent(model.engine.next_background(self.now))
            model.next_demand()
            for fetch in list(model.requests.values()):
                extents = [Extent(part, DATA) for part in fetch.runs]
                for order in model.arrived(extents, [fetch.request_id], self.now):
                    model.installed(order.run)
        assert model.engine.finished
        assert model.engine.waiting == []
        assert model.engine.background_in_flight_bytes == 0


EngineMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestEngineMachine = EngineMachine.TestCase


# ---- every short program ---------------------------------------------------------------------------------

Step = Callable[[Model], None]


def _fault(key: str, page: int) -> Step:
    def step(model: Model) -> None:
        for zero in model.fault(key, [page], Priority.VCPU if key == "a" else Priority.VMM, 0.0):
            model.installed(run(zero), zero=True)

    return step


def _remove(page: int) -> Step:
    def step(model: Model) -> None:
        for zero in model.removed(run(page)):
            model.installed(run(zero), zero=True)

    return step


def _send(model: Model) -> None:
    model.next_demand()


def _send_background(model: Model) -> None:
    model.sent(model.engine.next_background(1.0 + len(model.requests) + REFUSAL_PAUSE_S))


def _answer(result: ExtentResult, *, twice: bool = False, half: bool = False) -> Step:
    def step(model: Model) -> None:
        if not model.requests:
            return
        request_id, fetch = next(iter(model.requests.items()))
        extents = [Extent(part, result) for part in fetch.runs]
        if half:
            extents = extents[:-1]
        for order in model.arrived(extents * (2 if twice else 1), [request_id], 0.0):
            model.installed(order.run, zero=order.data_offset < 0)

    return step


def _install_elsewhere(model: Model) -> None:
    model.installed(run(0), existed=True)


def _disconnect(model: Model) -> None:
    model.lost(None)


def _kick(model: Model) -> None:
    model.forget("a")


STEPS: dict[str, Step] = {
    "vCPU faults on 0": _fault("a", 0),
    "VMM faults on 0": _fault("b", 0),
    "VMM faults on 1": _fault("b", 1),
    "kick": _kick,
    "send": _send,
    "send background": _send_background,
    "data": _answer(DATA),
    "data twice": _answer(DATA, twice=True),
    "half": _answer(DATA, half=True),
    "zero": _answer(ZERO),
    "refused": _answer(REFUSED),
    "remove 0": _remove(0),
    "somebody installs 0": _install_elsewhere,
    "disconnect": _disconnect,
}
DEPTH = 4


@pytest.mark.parametrize("first", STEPS)
@pytest.mark.parametrize("page_count", [1, 2, 4])
def test_every_program_of_a_tiny_guest(first: str, page_count: int) -> None:
    """All programs of `DEPTH` steps; the guest is then carried to its end."""
    names = [name for name in STEPS if page_count > 1 or "1" not in name]
    if first not in names:
        return
    layout = Layout([(page_count * PAGE, PAGE)])
    config = EngineConfig(demand_pages_max=2, batch_bytes_max=2 * PAGE, neighbour_pages_max=0)
    for program in itertools.product(names, repeat=DEPTH - 1):
        model = Model(FaultEngine(layout, config))
        try:
            for name in (first, *program):
                STEPS[name](model)
            _carry_to_its_end(model)
        except AssertionError as error:
            error.add_note(f"program: {(first, *program)}")
            raise


def _carry_to_its_end(model: Model) -> None:
    for step in range(32):
        if model.engine.finished:
            break
        model.sent(model.engine.next_background(10.0 + step))
        model.next_demand()
        while model.requests:
            _answer(DATA)(model)
    assert model.engine.finished
    assert not model.waiters
    assert all(mine.state in (PageState.INSTALLED, PageState.REMOVED) for mine in model.pages)
