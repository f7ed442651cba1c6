"""The background's credit: what it fills, and how it yields, on a simulated link."""

from __future__ import annotations

import heapq
import random

import pytest
from farfault_client.engine import EngineConfig, Extent, ExtentResult, FaultEngine, Fetch, Priority
from farfault_client.engine.way import EPOCH_S, RATE_ROUNDS, Departure, Way
from farfault_client.engine.window import (
    BATCH_BYTES_MIN,
    BATCH_S,
    BATCHES_AHEAD,
    CRUISE_GAIN,
    DATA_QUEUE_S,
    QUIET_GAIN,
    QUIET_S,
    UNKNOWN_BYTES_MAX,
    BackgroundWindow,
)
from farfault_shim.layout import Layout, PageIndex

PAGE, HUGE = 4096, 2 << 20
BATCH = 256 << 10
STEP_S = 0.00025


class Link:
    """A page server behind a link of some bandwidth and delay; both lanes share the link, demand goes first."""

    def __init__(self, engine: FaultEngine, bytes_per_s: float, rtt_s: float, jitter_s: float = 0.0) -> None:
        self.engine, self.bytes_per_s, self.rtt_s, self.jitter_s = engine, bytes_per_s, rtt_s, jitter_s
        self.now = 0.0
        self.rng = random.Random(1)
        self.queue: list[tuple[float, int, Fetch]] = []
        self.free_at = 0.0
        self.background_sent: list[float] = []
        self.in_flight_max = 0

    def pump(self) -> None:
        while fetch := self.engine.next_demand():
            self._send(fetch)
        while fetch := self.engine.next_background(self.now):
            self.background_sent.append(self.now)
            self._send(fetch)
        self.in_flight_max = max(self.in_flight_max, self.engine.background_in_flight_bytes)

    def _send(self, fetch: Fetch) -> None:
        begin = (
            self.now + self.rtt_s / 2
            if fetch.priority <= Priority.VMM
            else max(self.now + self.rtt_s / 2, self.free_at)
        )
        end = begin + fetch.size_bytes / self.bytes_per_s
        self.free_at = max(self.free_at + fetch.size_bytes / self.bytes_per_s, end)
        arrives = end + self.rtt_s / 2 + self.rng.random() * self.jitter_s
        heapq.heappush(self.queue, (arrives, fetch.request_id, fetch))

    def run(self, until: float) -> None:
        """Answers arrive until a time, or until everything is there."""
        while not self.engine.finished and self.now < until:
            self.pump()
            step = self.now + STEP_S
            if self.queue and self.queue[0][0] <= step:
                self.now, _, fetch = heapq.heappop(self.queue)
                extents = [Extent(run, ExtentResult.DATA) for run in fetch.runs]
                for order in self.engine.arrived(extents, [fetch.request_id], self.now):
                    self.engine.installed(order.run)
            else:
                self.now = step


def _engine(size_bytes: int, page: int = PAGE) -> FaultEngine:
    return FaultEngine(Layout([(size_bytes, page)]), EngineConfig(batch_bytes_max=BATCH))


@pytest.mark.parametrize(
    ("gbit_per_s", "rtt_ms"), [(10, 25), (10, 1), (1, 25), (25, 0.2), (10, 0.05), (1, 100), (0.1, 25)]
)
def test_a_quiet_guest_fills_the_link(gbit_per_s: float, rtt_ms: float) -> None:
    """Slow start included, over eighty round trips or more."""
    bytes_per_s, rtt_s = gbit_per_s / 8 * 1e9, rtt_ms / 1000
    size_bytes = max(256 << 20, int(80 * bytes_per_s * rtt_s)) // HUGE * HUGE
    link = Link(_engine(size_bytes), bytes_per_s, rtt_s)
    link.run(1e9)
    assert size_bytes / bytes_per_s / link.now > 0.8


def test_jitter_does_not_starve_it() -> None:
    link = Link(_engine(2 << 30), 1.25e9, 0.025, jitter_s=0.005)
    link.run(1e9)
    assert (2 << 30) / 1.25e9 / link.now > 0.8


def test_the_queue_on_the_way_stays_short() -> None:
    """A window without end would put seconds of bytes before the next fault on a slow link."""
    link = Link(_engine(1 << 30), 125e6, 0.001)  # eight seconds: four epochs
    link.run(1e9)
    assert link.in_flight_max <= 125e6 * 0.010 + 4 * BATCH


def test_a_longer_way_is_learnt() -> None:
    link = Link(_engine(6 << 30), 1.25e9, 0.001)
    link.run(0.2)
    link.rtt_s = 0.025
    link.run(3.0)
    settled_pages = link.engine.settled_pages
    link.run(4.5)
    assert (link.engine.settled_pages - settled_pages) * PAGE / 1.5 > 0.8 * 1.25e9


def test_a_guest_that_faults_without_pause_does_not_starve_it() -> None:
    """Threads wait at all times; the background still carries most of what the link does."""
    engine = _engine(64 << 20)
    link = Link(engine, 1.25e9, 0.001)
    pages = iter(random.Random(2).sample(range(1 << 14), 1 << 14))
    while not engine.finished and link.now < 5.0:
        while len(engine.waiting) < 4 and not engine.finished:
            page = next(pages, None)
            if page is None:
                break
            engine.fault(page % 64, [PageIndex(page)], Priority.VCPU, link.now)
        link.run(link.now + 0.0005)
    assert engine.finished
    assert (64 << 20) / 1.25e9 / link.now > 0.5


def steady(
    window: BackgroundWindow, bytes_per_s: float, rtt_s: float, begin: float, seconds: float, *, zeros: bool = False
) -> float:
    """Keeps as much in flight as the window says. Returns when it stopped."""
    now, in_flight = begin, 0
    answers: list[tuple[float, int, Departure]] = []
    free_at = begin
    while now < begin + seconds:
        while in_flight < window.size_bytes:
            departure = window.sent(in_flight, now)
            free_at = max(free_at, now) + window.batch_bytes / bytes_per_s
            answers.append((free_at + rtt_s, window.batch_bytes, departure))
            in_flight += window.batch_bytes
        now, size_bytes, departure = answers.pop(0)
        in_flight -= size_bytes
        window.arrived(size_bytes, 0 if zeros else size_bytes, now, departure)
    return now


def test_it_holds_what_the_way_does_and_two_batches() -> None:
    window = BackgroundWindow()
    now = steady(window, 5e8, 0.010, 0.0, 1.0)
    window.fault(now)
    batch = window.batch_bytes
    assert batch == pytest.approx(5e8 * BATCH_S, rel=0.1)
    assert window.size_bytes == pytest.approx(CRUISE_GAIN * (5e8 * 0.010 + batch) + BATCHES_AHEAD * batch, rel=0.15)
    before = window.size_bytes
    now = steady(window, 5e8, 0.010, now, QUIET_S * 2)  # no fault for a while
    assert window.size_bytes == pytest.approx(before * QUIET_GAIN / CRUISE_GAIN, rel=0.15)


@pytest.mark.parametrize(
    ("bytes_per_s", "batch"), [(12.5e6, BATCH_BYTES_MIN), (125e6, int(125e6 * BATCH_S)), (12.5e9, 1 << 20)]
)
def test_a_batch_is_what_the_way_carries_in_little_time(bytes_per_s: float, batch: int) -> None:
    window = BackgroundWindow()
    steady(window, bytes_per_s, 0.001, 0.0, 1.0)
    assert window.batch_bytes == pytest.approx(batch, rel=0.1)


def test_a_way_that_has_become_slow_holds_less() -> None:
    window = BackgroundWindow()
    now = steady(window, 1e9, 0.010, 0.0, 0.5)
    before = window.size_bytes
    steady(window, 1e8, 0.010, now, 3 * EPOCH_S + 2 * RATE_ROUNDS * before / 1e8)
    assert window.size_bytes < before / 4


def test_zero_pages_do_not_make_room_for_seconds_of_data() -> None:
    """A way of 12.5 MB/s: zero pages come back at 5 GB/s for a while, then data again."""
    window = BackgroundWindow()
    now = steady(window, 12.5e6, 0.025, 0.0, 2.0)
    of_data = window.size_bytes
    now = steady(window, 5e9, 0.025, now, 5.0, zeros=True)
    assert of_data < window.size_bytes < 12.5e6 * (0.035 + DATA_QUEUE_S)
    steady(window, 12.5e6, 0.025, now, 2.0)
    assert window.size_bytes < 2 * of_data


def test_before_any_data_the_window_is_small() -> None:
    window = BackgroundWindow()
    steady(window, 5e9, 0.025, 0.0, 1.0, zeros=True)
    assert window.size_bytes == UNKNOWN_BYTES_MAX


def test_a_page_that_travelled_alone_says_nothing_about_how_much_data_fits() -> None:
    """A guest's first page, then zero pages for a while: the window must not stay at its floor."""
    window = BackgroundWindow()
    window.arrived(PAGE, PAGE, 0.011, window.sent(0, 0.0))
    steady(window, 1e9, 0.010, 0.011, 0.5, zeros=True)
    assert window.size_bytes > 4 * window.floor_bytes


def test_it_ends_at_its_ceiling_and_begins_at_its_floor_again() -> None:
    window = BackgroundWindow()
    steady(window, 1e11, 0.025, 0.0, 1.0)
    assert window.size_bytes == window.ceiling_bytes
    window.lost()
    assert window.size_bytes == window.floor_bytes


def test_answers_in_a_burst_do_not_make_the_way_look_fast() -> None:
    """The receiver was busy for 5 ms; eight answers that came meanwhile are taken within a microsecond."""
    way, rate, in_flight = Way(), 1e8, 0
    departures = []
    for step in range(200):
        departures.append(way.departed(in_flight, step * 0.001))
        in_flight += 100_000
        if step % 5 == 4:
            for departure in departures:
                way.arrived(100_000, 100_000, step * 0.001 + 1e-6, departure)
            departures, in_flight = [], 0
    assert way.bytes_per_s < 1.3 * rate


def test_a_shortest_round_trip_is_measured_anew_without_a_queue() -> None:
    way = Way()
    way.arrived(1000, 1000, 0.001, way.departed(0, 0.0))
    assert way.holds_bytes == pytest.approx(1000)
    now = EPOCH_S + 0.1
    queued = way.departed(0, now)
    way.arrived(1000, 1000, now + 0.1, way.departed(1000, now))
    assert way.is_draining
    way.arrived(1000, 1000, now + 0.2, queued)  # sent before the queue was known
    assert way.is_draining
    assert way.holds_bytes == pytest.approx(0.001 * way.bytes_per_s)
    way.arrived(1000, 1000, now + 0.35, way.departed(0, now + 0.3))
    assert not way.is_draining
    assert way.holds_bytes == pytest.approx(0.05 * way.bytes_per_s)


def test_a_guest_that_faults_without_pause_leaves_the_background_the_way() -> None:
    """10 Gb/s at 10 ms: the way is full although a thread waits at all times."""
    engine = _engine(1 << 30)
    link = Link(engine, 1.25e9, 0.010)
    pages = iter(random.Random(3).sample(range(1 << 18), 1 << 18))
    while not engine.finished and link.now < 20.0:
        if not engine.waiting:
            engine.fault("vcpu", [PageIndex(next(pages))], Priority.VCPU, link.now)
        link.run(link.now + 0.0005)
    assert engine.finished
    assert (1 << 30) / 1.25e9 / link.now > 0.8
