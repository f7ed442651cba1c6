"""The core of the load generator, against a server of virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest
from farfault.synthetic import synthetic_page
from farfault.v1 import pages_pb2 as pb
from farfault_client.engine import Extent, ExtentResult
from farfault_client.load.background import REQUESTS_IN_FLIGHT, BackgroundPull
from farfault_client.load.faults import Ending, FaultLoad
from farfault_client.load.plan import ERRORS_IN_A_ROW_MAX, OUTSTANDING_MAX, PatternKind, PatternPlan
from farfault_client.load.schedule import ConstantRate, Schedule
from farfault_client.load.tally import Tally, figures_us, merged
from farfault_client.load.vcpus import Vcpus
from farfault_client.load.verifier import SeedVerifier
from farfault_client.session.answers import Answer
from farfault_shim.layout import Layout, PageIndex, PageRun

PAGE = 4096
SEED = 5


def answer_to(request: pb.FetchRequest, *, seed: int = SEED, leave_out: bool = False) -> Answer:
    """What a page server with one region answers."""
    extents, data = [], b""
    for wanted in request.ranges:
        for page in range(wanted.first_page, wanted.first_page + wanted.page_count):
            content = synthetic_page(seed, 0, page, PAGE)
            result = ExtentResult.DATA if any(content) else ExtentResult.ZERO
            extents.append(Extent(PageRun(PageIndex(page), 1), result))
            data += content if result is ExtentResult.DATA else b""
    return Answer([] if leave_out else extents, data, 0, (request.request_id,), (), 0, 0)


def refusal_of(request: pb.FetchRequest) -> Answer:
    runs = [PageRun(PageIndex(wanted.first_page), wanted.page_count) for wanted in request.ranges]
    extents = [Extent(run, ExtentResult.REFUSED) for run in runs]
    return Answer(extents, b"", 0, (request.request_id,), ("NOT_FROZEN",), 0, 0)


class VirtualServer:
    """Answers each request after a time, and runs the load on a clock of its own.

    Args:
        load: what is driven.
        service_s: from a request at a time to how long its answer takes.
    """

    def __init__(self, load: FaultLoad, service_s: Callable[[float], float]) -> None:
        self.load = load
        self.service_s = service_s
        self.now = 0.0
        self.requests: list[pb.FetchRequest] = []
        self._answers: list[tuple[float, int, int, pb.FetchRequest]] = []
        self.answer: Callable[[pb.FetchRequest], Answer] = answer_to

    def run(
        self, *, until: float, measured_from: float = 0.0, schedule: Schedule | None = None, pages: int = 0
    ) -> Tally:
        self.load.begin(0.0, measured_from=measured_from, until=until, schedule=schedule, pages_max=pages)
        self._send()
        for _ in range(1_000_000):
            if self.load.is_drained:
                break
            due = self.load.next_due()
            answered = self._answers[0][0] if self._answers else None
            if due is not None and (answered is None or due <= answered):
                self.now = max(self.now, due)
                self.load.advance(self.now)
            else:
                assert answered is not None, "nothing left to happen, and not drained"
                self.now, _, connection, request = heapq.heappop(self._answers)
                self.load.answered(connection, self.answer(request), self.now)
                self.load.resume(self.now)
            self._send()
        self.load.end(self.now)
        return self.load.take_tally(self.load.measured_until)

    def _send(self) -> None:
        for connection in self.load.take_wakeups():
            while (request := self.load.next_request(connection)) is not None:
                self.requests.append(request)
                at = self.now + self.service_s(self.now)
                heapq.heappush(self._answers, (at, len(self.requests), connection, request))


def load_of(
    pages: int = 1000, vcpus: int = 4, kind: PatternKind = PatternKind.RANDOM, *, refetch: bool = False, **options: int
) -> FaultLoad:
    layout = Layout([(pages * PAGE, PAGE)])
    plan = PatternPlan(kind=kind, refetch=refetch)
    verifier = SeedVerifier(SEED, layout)
    return FaultLoad(layout, Vcpus(plan, pages, range(vcpus), vcpus), refetch=refetch, verifier=verifier, **options)


def verifier_of(load: FaultLoad) -> SeedVerifier:
    assert load._verifier is not None
    return load._verifier


# ---- closed loop -------------------------------------------------------------------------------------


def test_a_closed_loop_has_one_fault_a_vcpu_and_fetches_every_page_once() -> None:
    load = load_of(pages=100, vcpus=4)
    tally = VirtualServer(load, lambda now: 0.001).run(until=10.0)
    assert load.ended_by is Ending.COMPLETE
    assert tally.pages == 100
    assert tally.page_bytes == 100 * PAGE
    assert tally.offered == tally.faults >= tally.pages
    assert tally.errors == tally.unexpected == 0
    assert verifier_of(load).verified == 100
    assert verifier_of(load).wrong == 0
    assert figures_us(tally.latency)["p50"] == pytest.approx(1000, rel=0.002)


def test_the_rate_of_a_closed_loop_follows_the_latency() -> None:
    load = load_of(pages=100_000, vcpus=8)
    server = VirtualServer(load, lambda now: 0.002)
    tally = server.run(until=1.0)
    assert load.ended_by is Ending.TIME
    assert tally.faults == pytest.approx(8 / 0.002, rel=0.01)
    assert max(len(request.ranges) for request in server.requests) <= 8


def test_waiting_faults_travel_together_up_to_the_bound() -> None:
    server = VirtualServer(load_of(vcpus=8), lambda now: 0.001)
    server.run(until=0.01)
    assert len(server.requests[0].ranges) == 8
    alone = VirtualServer(load_of(vcpus=8, pages_per_request=1), lambda now: 0.001)
    alone.run(until=0.01)
    assert {len(request.ranges) for request in alone.requests} == {1}


def test_no_more_requests_are_in_flight_than_the_server_allows() -> None:
    load = load_of(vcpus=8, pages_per_request=1, requests_max=3)
    load.begin(0.0, measured_from=0.0, until=1.0)
    requests = [load.next_request(0) for _ in range(4)]
    assert requests[3] is None
    assert requests[0] is not None
    load.take_wakeups()
    load.answered(0, answer_to(requests[0]), 0.1)
    assert list(load.take_wakeups()) == [0]
    assert load.next_request(0) is not None


def test_warm_up_is_not_counted_and_does_not_use_the_memory_up() -> None:
    load = load_of(pages=50, vcpus=1)
    tally = VirtualServer(load, lambda now: 0.01).run(measured_from=1.0, until=100.0)
    assert tally.pages in {49, 50}  # one may have been on its way when the warm-up ended
    assert load.ended_by is Ending.COMPLETE


def test_the_warm_up_ends_even_where_an_answer_comes_before_the_timer() -> None:
    load = load_of(pages=50, vcpus=1)
    load.begin(0.0, measured_from=1.0, until=100.0)
    now = 0.9
    for _ in range(60):
        request = load.next_request(0)
        if request is None:
            break
        load.answered(0, answer_to(request), now)
        now += 0.2
        load.resume(now)
        load.advance(now)
    assert load.ended_by is Ending.COMPLETE
    assert load.take_tally(now).pages == 50


def test_pages_are_a_bound() -> None:
    load = load_of(vcpus=4)
    tally = VirtualServer(load, lambda now: 0.001).run(until=100.0, pages=37)
    assert tally.pages == 37
    assert load.ended_by is Ending.PAGES


def test_with_refetch_every_access_is_a_fault() -> None:
    load = load_of(pages=10, vcpus=2, refetch=True)
    tally = VirtualServer(load, lambda now: 0.001).run(until=1.0)
    assert tally.faults == pytest.approx(2000, rel=0.01)
    assert load.hits == 0
    assert load.ended_by is Ending.TIME


def test_a_run_begins_afresh() -> None:
    load = load_of(pages=100)
    first = VirtualServer(load, lambda now: 0.001).run(until=10.0)
    second = VirtualServer(load, lambda now: 0.001).run(until=10.0)
    assert first.pages == second.pages == 100


# ---- open loop ---------------------------------------------------------------------------------------


def test_an_open_loop_keeps_its_rate_whatever_the_latency() -> None:
    tally = VirtualServer(load_of(pages=100_000), lambda now: 0.05).run(until=2.0, schedule=ConstantRate(0.0, 1000.0))
    assert tally.offered == tally.faults == 2000
    assert figures_us(tally.latency)["max"] == pytest.approx(50_000, rel=0.002)


def stalls(now: float) -> float:
    """0.1 ms, but nothing is answered in the second second."""
    return (2.0 - now if 1.0 <= now < 2.0 else 0.0) + 0.0001


def test_a_stall_is_charged_to_every_fault_that_it_delayed() -> None:
    """Coordinated omission: a closed loop asks once in a stall, an open one counts all that were due."""
    opened = VirtualServer(load_of(pages=100_000), stalls).run(until=5.0, schedule=ConstantRate(0.0, 1000.0))
    assert opened.faults == 5000
    assert opened.latency.get_value_at_percentile(90.0) == pytest.approx(500_000, rel=0.02)
    closed = VirtualServer(load_of(pages=200_000, vcpus=1), stalls).run(until=3.0)
    assert closed.latency.get_value_at_percentile(99.0) == pytest.approx(100, rel=0.02)


def test_faults_over_the_bound_stay_due_and_count_from_then() -> None:
    load = load_of(pages=1_000_000, kind=PatternKind.SEQUENTIAL)
    load.begin(0.0, measured_from=0.0, until=10.0, schedule=ConstantRate(0.0, 10_000.0))
    load.advance(1.0)
    requests = []
    while (request := load.next_request(0)) is not None:
        requests.append(request)
    assert sum(len(request.ranges) for request in requests) == OUTSTANDING_MAX
    assert load.next_due() == 10.0, "nothing to do before an answer"
    for request in requests:
        load.answered(0, answer_to(request), 2.0)
    load.resume(2.0)
    assert load.next_request(0) is not None
    load.stop(Ending.TOLD)
    load.end(2.0)
    tally = load.take_tally(2.0)
    assert tally.faults == OUTSTANDING_MAX
    assert tally.errors == OUTSTANDING_MAX, "the second lot was never answered"
    assert tally.unfinished == 20_000 - 2 * OUTSTANDING_MAX
    assert tally.offered == 20_000
    assert tally.latency.get_total_count() == 20_000
    assert figures_us(tally.latency)["max"] == pytest.approx(2e6, rel=0.002)


# ---- trouble -----------------------------------------------------------------------------------------


def test_a_lost_lane_asks_again_and_its_faults_go_on_waiting() -> None:
    load = load_of(vcpus=2)
    load.begin(0.0, measured_from=0.0, until=10.0)
    lost = load.next_request(0)
    assert lost is not None
    load.lane_lost(0)
    again = load.next_request(0)
    assert again is not None
    assert [wanted.first_page for wanted in again.ranges] == [wanted.first_page for wanted in lost.ranges]
    load.answered(0, answer_to(again), 3.0)
    tally = load.take_tally(3.0)
    assert tally.asked_again == tally.pages == 2
    assert figures_us(tally.latency)["max"] == pytest.approx(3e6, rel=0.002)


def test_refusals_are_errors_and_too_many_end_the_run() -> None:
    load = load_of(pages=100_000, vcpus=4)
    server = VirtualServer(load, lambda now: 0.001)
    server.answer = refusal_of
    tally = server.run(until=1000.0)
    assert load.ended_by is Ending.REFUSED
    assert tally.errors >= ERRORS_IN_A_ROW_MAX
    assert tally.pages == 0
    assert load.refusals["NOT_FROZEN"] > 0


def test_a_page_that_an_answer_leaves_out_is_an_error() -> None:
    load = load_of(pages=100_000, vcpus=1)
    server = VirtualServer(load, lambda now: 0.001)
    server.answer = lambda request: answer_to(request, leave_out=True)
    tally = server.run(until=0.1)
    assert tally.errors == tally.offered > 0
    assert load.refusals["LEFT_OUT"] == tally.errors


def test_pages_nobody_asked_for_are_counted_apart() -> None:
    load = load_of(pages=10, vcpus=1)
    load.begin(0.0, measured_from=0.0, until=1.0)
    request = pb.FetchRequest(request_id=999, ranges=[pb.PageRange(region=0, first_page=0, page_count=10)])
    load.answered(0, answer_to(request), 0.1)
    assert load.take_tally(0.2).unexpected == 9


def test_wrong_bytes_are_found_and_described() -> None:
    load = load_of(pages=64, vcpus=2)
    server = VirtualServer(load, lambda now: 0.001)
    server.answer = lambda request: answer_to(request, seed=SEED + 1)
    server.run(until=10.0)
    verifier = verifier_of(load)
    assert verifier.wrong > 32
    assert "of region 0 differs from byte" in verifier.problems[0]
    assert len(verifier.problems) <= 10


@pytest.mark.parametrize("at", [0, 15, 16, 2048, PAGE - 1])
def test_one_wrong_bit_is_enough(at: int) -> None:
    verifier = SeedVerifier(SEED, Layout([(64 * PAGE, PAGE)]))
    page = next(page for page in range(64) if any(synthetic_page(SEED, 0, page, PAGE)))
    content = bytearray(synthetic_page(SEED, 0, page, PAGE))
    run = PageRun(PageIndex(page), 1)
    verifier.check(run, b"head" + bytes(content), 4)
    assert verifier.wrong == 0
    content[at] ^= 1
    verifier.check(run, bytes(content))
    verifier.check(run, None)
    assert verifier.wrong == 2
    assert f"byte {at} on" in verifier.problems[0]


# ---- background --------------------------------------------------------------------------------------


def test_the_background_goes_round_the_memory_within_its_credit() -> None:
    layout = Layout([(100 * PAGE, PAGE), (70 * PAGE, PAGE)])
    pull = BackgroundPull(layout, 0, None)
    pull.begin(0.0, measured_from=0.0, until=10.0)
    requests = []
    while (request := pull.next_request(0)) is not None:
        requests.append(request)
    assert len(requests) == REQUESTS_IN_FLIGHT
    windows = [(r.ranges[0].region, r.ranges[0].first_page, r.ranges[0].page_count) for r in requests[:5]]
    assert windows == [(0, 0, 64), (0, 64, 36), (1, 0, 64), (1, 64, 6), (0, 0, 64)]
    pull.lane_lost(0)
    assert pull.next_request(0) is not None
    pull.stop(Ending.TOLD)
    assert pull.next_request(0) is None


def test_the_background_keeps_its_cap() -> None:
    pull = BackgroundPull(Layout([(1 << 30, PAGE)]), 1 << 20, None)
    pull.begin(0.0, measured_from=0.0, until=100.0)
    sent, now = 0, 0.0
    while now < 10.0:
        while (request := pull.next_request(0)) is not None:
            sent += request.ranges[0].page_count * PAGE
            pull.answered(0, Answer([], b"", 0, (request.request_id,), (), 0, 0), now)
        due = pull.next_due()
        assert due is not None
        assert due > now
        now = due
        pull.advance(now)
    assert sent == pytest.approx(10 << 20, rel=0.05)


# ---- tallies -----------------------------------------------------------------------------------------


def test_tallies_survive_json_and_add_up() -> None:
    server = VirtualServer(load_of(pages=5000), lambda now: 0.001)
    tally = server.run(until=1.0, measured_from=0.5, schedule=ConstantRate(0.0, 100.0))
    copy = Tally.from_json(tally.to_json())
    assert copy.to_json() == tally.to_json()
    total = merged([tally, copy])
    assert total.pages == 2 * tally.pages == 100
    assert total.latency.get_total_count() == 100
    assert (total.started_at, total.ended_at) == (0.5, 1.0)
