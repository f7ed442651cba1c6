"""The express demand lane: requests for one page and their answers go the short way, everything else the long one."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from farfault.checksum import batch_checksum
from farfault.codec import encode_batch
from farfault.v1 import pages_pb2 as pb
from farfault_client.engine import Priority
from farfault_client.receive.lone_faults import LoneFaults
from farfault_client.session.answers import Answer, BadAnswerError, LonePage
from farfault_client.session.express_lane import ExpressLane
from farfault_client.session.frames import frame
from farfault_client.session.lane import Lane, LaneLostError, LaneStats
from farfault_client.session.lease import Lease
from farfault_shim.layout import Layout

PAGE = 4096
GENERATION = 7
LAYOUT = Layout([(16 * PAGE, PAGE), (64 * PAGE, PAGE)])
DATA = bytes(range(256)) * (PAGE // 256)


pytestmark = pytest.mark.skipif(LoneFaults.of(LAYOUT) is None, reason="make native, with libxxhash-dev")


class Transport:
    """Remembers what was written."""

    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        if self.is_aborted:
            raise RuntimeError("the handler is closed")  # as uvloop's does
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True


class User:
    """Takes pages if it is told to."""

    def __init__(self) -> None:
        self.takes = True
        lone = LoneFaults.of(LAYOUT)
        assert lone is not None, "make native"
        self.lone = lone
        self.pages: list[tuple[int, bytes]] = []
        self.answers: list[Answer] = []
        self.requests: list[pb.FetchRequest] = []

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        return self.requests.pop(0) if self.requests else None

    def answered(self, lane: Lane, answer: Answer) -> None:
        self.answers.append(answer)

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        came = self.lone.came(data, position) if self.takes else None
        if came is not None:
            self.pages.append((came.request_id, data[came.data_at : came.data_at + PAGE]))
        return came

    def placed(self, lane: Lane, placed: Any) -> None:
        raise AssertionError

    def lane_lost(self, lane: Lane) -> None:
        raise AssertionError


def answer(request_id: int, page: int, data: bytes = DATA) -> bytes:
    """The frame that a server sends for it."""
    region = LAYOUT.region_of_page(page)
    extents = [(region.index, page - region.first_page, 1, pb.EXTENT_KIND_DATA)]
    checksum = batch_checksum([request_id], extents, GENERATION, (data,))
    return frame(encode_batch([request_id], extents, checksum, data, GENERATION))


class Connection:
    """A lane that was let in, and both its ends."""

    def __init__(self) -> None:
        self.user, self.transport, self.stats = User(), Transport(), LaneStats()
        lease = Lease("lease", "token", GENERATION, LAYOUT)
        self.lane = ExpressLane(lease, self.user, self.stats, 1 << 20)
        self.lane.connection_made(self.transport)  # type: ignore[arg-type]
        self.lane.data_received(frame(pb.LaneWelcome().SerializeToString()))

    def ask(self, request_id: int, page: int) -> None:
        """As the pager asks for the page of most faults."""
        request = self.user.lone.request(page, request_id, Priority.VCPU, GENERATION)
        assert request is not None
        self.lane.send_pages(request, 1)


def test_a_page_that_was_asked_for_comes_the_short_way() -> None:
    async def play() -> None:
        there = Connection()
        there.ask(5, 20)
        sent = pb.FetchRequest.FromString(there.transport.written[4:])
        assert (sent.request_id, sent.priority) == (5, pb.PRIORITY_VCPU)
        assert [(item.region, item.first_page, item.page_count) for item in sent.ranges] == [(1, 4, 1)]
        there.lane.data_received(answer(5, 20))
        assert there.user.pages == [(5, DATA)]
        assert there.user.answers == []
        assert there.stats.answers == 1
        assert there.stats.wire_bytes == len(answer(5, 20))

    asyncio.run(play())


def test_answers_come_in_any_order_and_in_pieces() -> None:
    async def play() -> None:
        there = Connection()
        rng = random.Random(1)
        for number in range(1, 33):
            there.ask(number, number)
        order = rng.sample(range(1, 33), 32)
        stream = b"".join(answer(number, number) for number in order)
        while stream:
            cut = rng.randint(1, 3 * PAGE)
            there.lane.data_received(stream[:cut])
            stream = stream[cut:]
        assert [request_id for request_id, _ in there.user.pages] == order

    asyncio.run(play())


def test_an_answer_that_the_user_does_not_take_goes_the_long_way() -> None:
    async def play() -> None:
        there = Connection()
        there.user.takes = False
        there.ask(5, 20)
        there.lane.data_received(answer(5, 20))
        (came,) = there.user.answers
        assert came.done == (5,)
        assert came.extents[0].run == (20, 1)
        assert came.data[came.data_offset :] == DATA
        assert there.stats.answers == 1

    asyncio.run(play())


def test_answers_that_share_a_batch_go_the_long_way() -> None:
    async def play() -> None:
        there = Connection()
        there.ask(5, 2)
        there.ask(6, 3)
        extents = [(0, 2, 2, pb.EXTENT_KIND_DATA)]
        checksum = batch_checksum([5, 6], extents, GENERATION, (DATA * 2,))
        there.lane.data_received(frame(encode_batch([5, 6], extents, checksum, DATA * 2, GENERATION)))
        assert [came.done for came in there.user.answers] == [(5, 6)]
        assert there.lane._unanswered == 0

    asyncio.run(play())


def test_a_damaged_page_ends_the_lane() -> None:
    async def play() -> None:
        there = Connection()
        there.ask(5, 20)
        bad = bytearray(answer(5, 20))
        bad[2000] ^= 1
        there.lane.data_received(bytes(bad))
        assert there.user.pages == []
        assert there.user.answers == []
        assert there.transport.is_aborted
        with pytest.raises(BadAnswerError, match="checksum"):
            await there.lane.run()

    asyncio.run(play())


@pytest.mark.parametrize("message", [b"\x00", b"\x0a", b"\x0a\x7f", b"\xff\xff\xff"])
def test_garbage_ends_the_lane(message: bytes) -> None:
    async def play() -> None:
        there = Connection()
        there.ask(5, 20)
        there.lane.data_received(frame(message))
        with pytest.raises((BadAnswerError, LaneLostError)):
            await there.lane.run()

    asyncio.run(play())


def test_a_page_that_is_asked_for_on_an_ended_lane_is_lost_with_it() -> None:
    async def play() -> None:
        there = Connection()
        there.lane.connection_lost(ConnectionResetError("reset"))
        written = there.transport.written
        there.ask(5, 20)
        assert there.transport.written == written
        with pytest.raises(LaneLostError):
            await there.lane.run()

    asyncio.run(play())


def test_pages_beside_requests_of_the_long_way() -> None:
    async def play() -> None:
        there = Connection()
        there.user.requests.append(pb.FetchRequest(request_id=1, ranges=[pb.PageRange(page_count=2)]))
        there.lane.pump()
        there.ask(2, 9)
        there.lane.data_received(answer(2, 9) + answer(1, 0))
        assert [request_id for request_id, _ in there.user.pages] == [2]
        assert [came.done for came in there.user.answers] == [(1,)]

    asyncio.run(play())
