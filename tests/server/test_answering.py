"""The core of a lane: what a client asks in any order and number is answered once, right, and within the limits."""

import errno
import os
from collections.abc import Callable, Iterator

import pytest
from farfault.checksum import checksum_of
from farfault.v1 import pages_pb2 as pb
from farfault_server.lanes import lone_answers
from farfault_server.lanes.answering import Answering
from farfault_server.lanes.limits import RANGES_WAITING_MAX, LaneLimits
from farfault_server.lanes.stats import LaneStats
from farfault_server.memory import FileRegion, PageRegion, ServedMemory
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

PAGE = 4096


class FakeRegion:
    """Pages by number; a page that is None cannot be read."""

    name = backing = "fake"
    page_size_bytes = PAGE

    def __init__(self, pages: list[bytes | None], known_zero: frozenset[int] = frozenset()) -> None:
        self.pages = pages
        self.size_bytes = len(pages) * PAGE
        self.known_zero = known_zero

    def read(self, first_page: int, page_count: int) -> bytes:
        pages = self.pages[first_page : first_page + page_count]
        if None in pages:
            raise OSError(errno.EIO, "poisoned")
        return b"".join(pages)

    def zero_pages_ahead(self, first_page: int, page_count: int) -> int:
        count = 0
        while count < page_count and first_page + count in self.known_zero:
            count += 1
        return count

    def identity(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


def page(number: int) -> bytes:
    return number.to_bytes(4, "little") * (PAGE // 4)


def answering(*regions: PageRegion, **limits: int) -> Answering:
    memory = ServedMemory(regions, readable=True, generation=9)
    lone = lone_answers.LoneAnswers(regions)
    return Answering(memory, LaneLimits(**limits), LaneStats(), clock_us=lambda: 1000, lone=lone)


def request(request_id: int, *ranges: tuple[int, int, int], priority: int = pb.PRIORITY_VCPU) -> bytes:
    pages = [pb.PageRange(region=region, first_page=first, page_count=count) for region, first, count in ranges]
    return pb.FetchRequest(request_id=request_id, priority=priority, ranges=pages).SerializeToString()


def drain(core: Answering) -> list[pb.PageBatch]:
    batches = []
    while (raw := core.next_batch()) is not None:
        batch = pb.PageBatch.FromString(raw)
        assert batch.generation == 9
        assert batch.checksum == checksum_of(batch, batch.data)
        batches.append(batch)
    return batches


def pages_of(batches: list[pb.PageBatch]) -> dict[tuple[int, int], bytes | str]:
    """What each page was answered with: its bytes or the name of its status."""
    pages: dict[tuple[int, int], bytes | str] = {}
    for batch in batches:
        offset = 0
        for extent in batch.extents:
            for number in range(extent.first_page, extent.first_page + extent.page_count):
                assert (extent.region, number) not in pages, "answered twice"
                if extent.kind == pb.EXTENT_KIND_DATA:
                    pages[extent.region, number] = batch.data[offset : offset + PAGE]
                    offset += PAGE
                elif extent.kind == pb.EXTENT_KIND_ZERO:
                    pages[extent.region, number] = bytes(PAGE)
                else:
                    pages[extent.region, number] = pb.ExtentKind.Name(extent.kind)
        assert offset == len(batch.data)
    return pages


def done_of(batches: list[pb.PageBatch]) -> list[int]:
    return [request_id for batch in batches for request_id in batch.done_request_ids]


def test_a_lone_request_is_answered_at_once():
    core = answering(FakeRegion([page(1)]))
    core.receive(request(5, (0, 0, 1)))
    (batch,) = drain(core)
    assert list(batch.done_request_ids) == [5]
    assert batch.data == page(1)


def test_requests_that_wait_share_a_batch():
    core = answering(FakeRegion([page(n) for n in range(1, 9)]))
    for number in range(8):
        core.receive(request(number, (0, number, 1)))
    (batch,) = drain(core)
    assert list(batch.done_request_ids) == list(range(8))
    assert len(batch.extents) == 1


def test_urgent_first():
    core = answering(FakeRegion([page(n) for n in range(1, 9)]), max_batch_bytes=PAGE)
    core.receive(request(1, (0, 0, 4), priority=pb.PRIORITY_BACKGROUND))
    core.receive(request(2, (0, 4, 1), priority=pb.PRIORITY_NEIGHBOUR))
    core.receive(request(3, (0, 5, 1), priority=pb.PRIORITY_VCPU))
    assert done_of(drain(core)) == [3, 2, 1]


def test_an_urgent_request_overtakes_one_that_is_half_answered():
    core = answering(FakeRegion([page(n) for n in range(1, 9)]), max_batch_bytes=PAGE)
    core.receive(request(1, (0, 0, 4), priority=pb.PRIORITY_BACKGROUND))
    assert core.next_batch() is not None
    core.receive(request(2, (0, 7, 1), priority=pb.PRIORITY_VCPU))
    assert done_of(drain(core)) == [2, 1]


def test_unknown_priorities_count_as_background():
    core = answering(FakeRegion([page(1)]), max_batch_bytes=PAGE)
    core.receive(request(1, (0, 0, 1), priority=0))
    core.receive(request(2, (0, 0, 1), priority=77))
    core.receive(request(3, (0, 0, 1), priority=pb.PRIORITY_HINT))
    assert done_of(drain(core)) == [3, 1, 2]


def test_big_answers_are_split():
    core = answering(FakeRegion([page(n + 1) for n in range(10)]), max_batch_bytes=4 * PAGE)
    core.receive(request(1, (0, 0, 10)))
    batches = drain(core)
    assert [len(batch.data) // PAGE for batch in batches] == [4, 4, 2]
    assert done_of(batches) == [1]
    assert list(batches[-1].done_request_ids) == [1]


def test_zero_pages_carry_no_data_and_cost_no_batch():
    core = answering(FakeRegion([bytes(PAGE)] * 40, known_zero=frozenset(range(20))), max_batch_bytes=4 * PAGE)
    core.receive(request(1, (0, 0, 40)))
    (batch,) = drain(core)
    assert not batch.data
    assert [(extent.first_page, extent.page_count) for extent in batch.extents] == [(0, 40)]


@pytest.mark.parametrize("bad", [(1, 0, 1), (0, 4, 1), (0, 3, 2), (0, 0, 0), (2**32 - 1, 2**64 - 1, 2**64 - 1)])
def test_a_bad_range_gets_its_status_and_the_others_are_served(bad):
    core = answering(FakeRegion([page(n + 1) for n in range(4)]))
    core.receive(request(1, (0, 0, 1), bad, (0, 1, 1)))
    (batch,) = drain(core)
    assert [pb.ExtentKind.Name(extent.kind)[12:] for extent in batch.extents] == ["DATA", "OUT_OF_RANGE", "DATA"]
    assert tuple((batch.extents[1].region, batch.extents[1].first_page, batch.extents[1].page_count)) == bad


def test_a_request_without_ranges_is_answered():
    core = answering(FakeRegion([page(1)]))
    core.receive(request(1))
    assert done_of(drain(core)) == [1]


def test_a_running_vm_is_not_read():
    core = answering(FakeRegion([None]))
    core._memory.readable = False
    core.receive(request(1, (0, 0, 1)))
    assert pages_of(drain(core)) == {(0, 0): "EXTENT_KIND_NOT_FROZEN"}


def test_only_unreadable_pages_fail():
    core = answering(FakeRegion([page(1), None, bytes(PAGE), page(4)]))
    core.receive(request(1, (0, 0, 4)))
    assert pages_of(drain(core)) == {
        (0, 0): page(1),
        (0, 1): "EXTENT_KIND_IO_ERROR",
        (0, 2): bytes(PAGE),
        (0, 3): page(4),
    }


def test_too_many_pages_in_a_request():
    core = answering(FakeRegion([page(n + 1) for n in range(8)]), max_request_pages=4)
    core.receive(request(1, (0, 0, 3), (0, 3, 2), (0, 5, 1)))
    answers = pages_of(drain(core))
    assert {number for (_, number), answer in answers.items() if answer == "EXTENT_KIND_REJECTED"} == {3, 4}


def test_too_many_requests_in_flight():
    core = answering(FakeRegion([page(n + 1) for n in range(8)]), max_requests_in_flight=2)
    for number in range(4):
        core.receive(request(number, (0, number, 1)))
    batches = drain(core)
    answers = pages_of(batches)
    assert [answers[0, number] == "EXTENT_KIND_REJECTED" for number in range(4)] == [False, False, True, True]
    assert sorted(done_of(batches)) == [0, 1, 2, 3]
    core.receive(request(9, (0, 7, 1)))  # answered ones make room
    assert pages_of(drain(core)) == {(0, 7): page(8)}


def test_full_says_so_and_drains():
    core = answering(FakeRegion([page(1)]))
    count = 0
    while not core.line.is_full:
        core.receive(request(count, *[(9, 0, 1)] * 1000))
        count += 1
    assert count == -(-RANGES_WAITING_MAX // 1000)
    batches = drain(core)
    assert max(batch.ByteSize() for batch in batches) < 64 << 10
    assert sorted(done_of(batches)) == list(range(count))
    assert not core.line.is_full


def test_nonsense_is_an_error():
    with pytest.raises(DecodeError):
        answering(FakeRegion([page(1)])).receive(b"\xff\xff")


CONTENT = st.sampled_from([None, bytes(PAGE), page(1), page(2), page(3)])
RANGE = st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 30))


@given(
    st.lists(st.lists(CONTENT, min_size=1, max_size=30), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 6), st.lists(RANGE, max_size=4)), max_size=12),
    st.integers(1, 8),
    st.data(),
)
def test_any_requests_are_answered_once_and_right(contents, requests, batch_pages, data):
    regions = [
        FakeRegion(pages, frozenset(n for n, content in enumerate(pages) if content == bytes(PAGE) and n % 3))
        for pages in contents
    ]
    core = answering(*regions, max_batch_bytes=batch_pages * PAGE, max_request_pages=40, max_requests_in_flight=8)
    batches = []
    for number, (priority, ranges) in enumerate(requests):
        core.receive(request(number, *ranges, priority=priority))
        if data.draw(st.booleans()) and (raw := core.next_batch()) is not None:
            batches.append(pb.PageBatch.FromString(raw))
    batches += drain(core)
    assert sorted(done_of(batches)) == list(range(len(requests)))
    assert all(len(batch.data) <= batch_pages * PAGE for batch in batches)
    for batch in batches:
        offset = 0
        for extent in batch.extents:
            if extent.kind in (pb.EXTENT_KIND_DATA, pb.EXTENT_KIND_ZERO):
                wanted = contents[extent.region][extent.first_page : extent.first_page + extent.page_count]
                size = extent.page_count * PAGE
                got = bytes(size) if extent.kind == pb.EXTENT_KIND_ZERO else batch.data[offset : offset + size]
                assert got == b"".join(wanted)
                offset += size if extent.kind == pb.EXTENT_KIND_DATA else 0
            elif extent.kind == pb.EXTENT_KIND_IO_ERROR:
                assert contents[extent.region][extent.first_page] is None


# ---- the short way of a lone request --------------------------------------------------------------------


has_library = pytest.mark.skipif(not lone_answers.LIBRARY.exists(), reason="make native, with libxxhash-dev")


@pytest.fixture
def in_a_file() -> Iterator[Callable[..., FileRegion]]:
    """Makes regions that are files; a page of None is behind the end of its file."""
    regions: list[FileRegion] = []

    def make(*pages: bytes | None) -> FileRegion:
        descriptor = os.memfd_create("test-region")
        os.pwrite(descriptor, b"".join(page for page in pages if page is not None), 0)
        size_bytes = len(pages) * PAGE
        region = FileRegion(descriptor, name="test", backing="memfd", size_bytes=size_bytes, page_size_bytes=PAGE)
        regions.append(region)
        return region

    yield make
    for region in regions:
        region.close()


@has_library
@pytest.mark.parametrize("request_id", [1, 127, 128, 1 << 40, (1 << 64) - 1])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("generation", [0, 9, 1 << 40])
def test_a_lone_request_gets_the_same_bytes_on_the_short_way(
    in_a_file: Callable[..., FileRegion], request_id: int, number: int, generation: int
) -> None:
    region = in_a_file(page(1), page(2), page(3), page(4))
    short, long = answering(region), answering(region)
    short._memory.generation = long._memory.generation = generation
    message = request(request_id, (0, number, 1))
    answer = short.lone_answer(message)
    assert answer is not None
    short.lone_answered(answer)
    frame = answer.frame
    assert int.from_bytes(frame[:4], "little") == len(frame) - 4
    long.receive(message)
    quick, slow = (pb.PageBatch.FromString(raw) for raw in (frame[4:], long.next_batch() or b""))
    for batch in (quick, slow):
        batch.server_read_us = 0  # time has passed for one of them only
    assert quick == slow
    assert quick.SerializeToString() == slow.SerializeToString()
    counted, wanted = short._stats.to_json(), long._stats.to_json()
    for field in ("bytes", "read"):
        counted.pop(field), wanted.pop(field)
    assert counted == wanted
    assert short._stats.bytes == len(frame) - 4
    assert short.next_pieces() is None


@pytest.mark.parametrize(
    "message",
    [
        request(1, (0, 0, 2)),
        request(1, (0, 0, 1), (0, 1, 1)),
        request(1),
        request(0, (0, 0, 1)),
        request(1, (1, 0, 1)),
        request(1, (0, 4, 1)),
        request(1, (0, 1 << 51, 1)),
        request(1, (0, (1 << 64) - 1, 1)),
        request(1, (0, 2, 1)),  # zero
        request(1, (0, 3, 1)),  # cannot be read
        request(1, (0, 0, 1), priority=0),
    ],
)
def test_whatever_is_not_plain_goes_the_long_way(in_a_file: Callable[..., FileRegion], message: bytes) -> None:
    core = answering(in_a_file(page(1), page(2), bytes(PAGE), None))
    assert core.lone_answer(message) is None
    assert core._stats.to_json() == LaneStats().to_json(), "nothing has happened"
    core.receive(message)
    assert drain(core)


@given(st.data())
def test_a_damaged_request_is_never_answered_in_part(data: st.DataObject) -> None:
    """What the short way takes for a request for one page is one for the generated class as well."""
    descriptor = os.memfd_create("test-region")
    try:
        os.pwrite(descriptor, page(1) * 300, 0)
        size_bytes = 300 * PAGE
        core = answering(
            FileRegion(descriptor, name="test", backing="memfd", size_bytes=size_bytes, page_size_bytes=PAGE)
        )
        message = bytearray(request(data.draw(st.integers(1, 1 << 20)), (0, data.draw(st.integers(0, 299)), 1)))
        for _ in range(data.draw(st.integers(1, 3))):
            message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
        cut = bytes(message[: data.draw(st.integers(0, len(message)))])
        answer = core.lone_answer(cut)
        if answer is not None:
            asked, batch = pb.FetchRequest.FromString(cut), pb.PageBatch.FromString(answer.frame[4:])
            assert list(batch.done_request_ids) == [asked.request_id]
            (wanted,), (extent,) = asked.ranges, batch.extents
            assert (wanted.region, wanted.first_page, 1) == (extent.region, extent.first_page, wanted.page_count)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("message", [b"", b"\x08", b"\x08\x01\x10\x01\x1a", b"\x08\x80\x00\x10\x01\x1a\x02\x18\x01"])
def test_no_request_for_one_page_is_the_general_ways(in_a_file: Callable[..., FileRegion], message: bytes) -> None:
    assert answering(in_a_file(page(1))).lone_answer(message) is None


def test_memory_that_is_no_file_goes_the_long_way() -> None:
    assert answering(FakeRegion([page(1)])).lone_answer(request(1, (0, 0, 1))) is None


@has_library
@pytest.mark.parametrize(
    ("priority", "faults"), [(pb.PRIORITY_VCPU, 1), (pb.PRIORITY_VMM, 1), (pb.PRIORITY_NEIGHBOUR, 0)]
)
@pytest.mark.parametrize("is_lone", [True, False])
def test_requests_that_a_thread_waits_for_are_counted_as_faults(
    in_a_file: Callable[..., FileRegion], priority: int, faults: int, is_lone: bool
) -> None:
    core = answering(in_a_file(page(1)))
    message = request(1, (0, 0, 1), priority=priority)
    if is_lone:
        answer = core.lone_answer(message)
        assert answer is not None
        core.lone_answered(answer)
    else:
        core.receive(message)
    assert (core._stats.requests, core._stats.faults) == (1, faults)


def test_a_lone_request_does_not_overtake_what_waits(in_a_file: Callable[..., FileRegion]) -> None:
    core = answering(in_a_file(page(1), page(2)))
    core.receive(request(1, (0, 0, 1)))
    assert core.lone_answer(request(2, (0, 1, 1))) is None


def test_a_lone_request_reads_nothing_of_a_running_vm(in_a_file: Callable[..., FileRegion]) -> None:
    core = answering(in_a_file(page(1)))
    core._memory.readable = False
    assert core.lone_answer(request(1, (0, 0, 1))) is None
