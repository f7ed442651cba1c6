"""What was requested at first hand, before the engine was told, and what it then knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from farfault.v1 import pages_pb2 as pb
from farfault_client.engine import Priority
from farfault_client.receive.lone_faults import Taken
from farfault_client.receive.pager import Pager
from farfault_client.session.connect import session_config
from farfault_client.session.lane import Lane
from farfault_client.session.lease import Lease
from farfault_client.session.session import Session
from farfault_shim.layout import Layout, PageIndex

PAGE_BYTES = 4096
LAYOUT = Layout([(1024 * PAGE_BYTES, PAGE_BYTES)])
VCPU_THREAD, OTHER_THREAD = 71, 72


class FakeSession(Session):
    """Takes requests at once, however they come."""

    def __init__(self) -> None:
        super().__init__(session_config("source.example:7777", insecure=True))
        self.lease = Lease("lease", "token", 7, LAYOUT)
        self.first_hand: list[int] = []
        self.asked: list[pb.FetchRequest] = []
        self.pager: Pager | None = None

    @property
    def takes_pages(self) -> bool:
        return True

    def send_pages(self, frames: bytes, request_ids: Sequence[int]) -> None:
        self.first_hand += request_ids

    def pump(self, lane: Lane) -> None:
        assert self.pager is not None
        while lane is Lane.DEMAND and (request := self.pager.next_request(lane)) is not None:
            self.asked.append(request)


class FakeLone:
    """Has read faults on these pages."""

    def __init__(self, faults: Iterable[tuple[int, int]]) -> None:
        self.faults = [(PageIndex(page), thread) for page, thread in faults]
        self.may_request: list[bool] = []

    def take(self, first_id: int, generation: int, *, may_request: bool) -> Taken:
        self.may_request.append(may_request)
        return Taken(b"frames", self.faults, []) if may_request else Taken(b"", [], [])

    def know_vcpus(self, threads: Iterable[int]) -> None:
        """Not asked."""

    def leave(self) -> None:
        """Nothing was removed."""


class FakeVmm:
    """Knows its vCPU's thread."""

    uffd = object()

    def vcpu_tids(self) -> dict[int, int]:
        return {VCPU_THREAD: 0}


def pager_with(faults: Iterable[tuple[int, int]]) -> tuple[Pager, FakeSession, FakeLone]:
    session, lone = FakeSession(), FakeLone(faults)
    pager = session.pager = Pager(session)
    pager._lone, pager._vmm = lone, FakeVmm()  # type: ignore[assignment]
    return pager, session, lone


def test_neighbours_are_numbered_after_all_faults_that_were_taken_together() -> None:
    pages = [100, 101, 102, 103, 500]
    pager, session, _ = pager_with((page, VCPU_THREAD) for page in pages)
    first_id = pager.engine.next_request_id
    pager._read_events()
    assert session.first_hand == list(range(first_id, first_id + 5))
    in_flight = pager.engine._in_flight
    assert [in_flight[number].runs[0].first for number in session.first_hand] == pages
    assert session.asked, "the guest goes through its memory in order"
    assert min(request.request_id for request in session.asked) == first_id + 5
    assert pager.stats.faults_by_source == {"uffd_vcpu": 5}


def test_threads_of_the_vmm_are_told_apart_from_vcpus() -> None:
    pager, session, _ = pager_with([(5, OTHER_THREAD), (9, VCPU_THREAD)])
    pager._read_events()
    assert [waiter.priority.name for waiter in pager.engine.waiting] == ["VMM", "VCPU"]
    assert pager.stats.faults_by_source == {"uffd_vmm": 1, "uffd_vcpu": 1}
    assert len(session.first_hand) == 2


def test_nothing_is_requested_at_first_hand_while_other_faults_wait_to_be_sent() -> None:
    pager, session, lone = pager_with([(5, VCPU_THREAD)])
    pager.engine.fault("a thread", [PageIndex(800)], Priority.VCPU, 0.0)
    pager._read_events()
    assert lone.may_request == [False]
    assert session.first_hand == []
    session.pump(Lane.DEMAND)
    pager._read_events()
    assert lone.may_request == [False, True]
