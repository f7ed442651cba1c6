"""Every malformed field of an answer, and answers that are good."""

from __future__ import annotations

import pytest
from farfault.checksum import checksum_of
from farfault.codec import decode_batch
from farfault.v1 import pages_pb2 as pb
from farfault_client.engine import ExtentResult, Fetch, Priority
from farfault_client.session.answers import DONE_MAX, EXTENTS_MAX, Answer, BadAnswerError, request_of, verify
from farfault_shim.layout import Layout, PageIndex, PageRun
from hypothesis import given
from hypothesis import strategies as st

PAGE, HUGE = 4096, 2 << 20
LAYOUT = Layout([(8 * PAGE, PAGE), (2 * HUGE, HUGE), (4 * PAGE, PAGE)])
GENERATION = 7
DATA, ZERO = pb.EXTENT_KIND_DATA, pb.EXTENT_KIND_ZERO


def batch(*extents: tuple[int, int, int, int], data: bytes | None = None, done: tuple[int, ...] = (1,)) -> pb.PageBatch:
    """A good batch of ``(region, first, count, kind)``, its data all 7s unless given."""
    if data is None:
        size = sum(count * LAYOUT.regions[region].page_size_bytes for region, _, count, kind in extents if kind == DATA)
        data = b"\7" * size
    message = pb.PageBatch(
        done_request_ids=done,
        extents=[
            pb.Extent(region=region, first_page=first, page_count=count, kind=kind)  # type: ignore[arg-type]
            for region, first, count, kind in extents
        ],
        data=data,
        generation=GENERATION,
        server_queue_us=11,
        server_read_us=12,
    )
    message.checksum = checksum_of(message, data)
    return message


def check(message: pb.PageBatch) -> Answer:
    return verify(decode_batch(message.SerializeToString()), LAYOUT, GENERATION)


def test_a_good_answer() -> None:
    answer = check(batch((0, 2, 3, DATA), (2, 0, 4, ZERO), (1, 1, 1, DATA), done=(4, 5)))
    assert answer.extents == [
        (PageRun(PageIndex(2), 3), ExtentResult.DATA),
        (PageRun(PageIndex(10), 4), ExtentResult.ZERO),
        (PageRun(PageIndex(9), 1), ExtentResult.DATA),
    ]
    assert answer.done == (4, 5)
    assert answer.refusals == ()
    assert (answer.server_queue_us, answer.server_read_us) == (11, 12)
    assert bytes(answer.data[answer.data_offset :])[: 3 * PAGE + HUGE] == b"\7" * (3 * PAGE + HUGE)


def test_an_empty_answer_may_end_a_request() -> None:
    assert check(batch(done=(9,))).done == (9,)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (pb.EXTENT_KIND_OUT_OF_RANGE, "OUT_OF_RANGE"),
        (pb.EXTENT_KIND_NOT_FROZEN, "NOT_FROZEN"),
        (pb.EXTENT_KIND_IO_ERROR, "IO_ERROR"),
        (pb.EXTENT_KIND_REJECTED, "REJECTED"),
        (99, "status 99"),
    ],
)
def test_refusals_are_named_and_carry_no_data(kind: int, name: str) -> None:
    answer = check(batch((0, 0, 2, kind), (0, 2, 1, DATA)))
    assert answer.refusals == (name,)
    assert answer.extents[0].result is ExtentResult.REFUSED
    assert answer.extents[1].result is ExtentResult.DATA


BIGGEST = (1 << 64) - 1


@pytest.mark.parametrize(
    "extent",
    [
        (3, 0, 1, DATA),
        ((1 << 32) - 1, 0, 1, ZERO),
        (0, 8, 1, DATA),
        (0, 7, 2, ZERO),
        (0, 0, 0, DATA),
        (0, 0, 9, ZERO),
        (0, BIGGEST, 1, ZERO),
        (0, 1, BIGGEST, ZERO),
        (0, BIGGEST, BIGGEST, pb.EXTENT_KIND_IO_ERROR),
        (1, 0, 3, pb.EXTENT_KIND_OUT_OF_RANGE),
    ],
)
def test_pages_that_do_not_exist_spoil_the_answer(extent: tuple[int, int, int, int]) -> None:
    with pytest.raises(BadAnswerError, match=r"region|pages"):
        check(batch((0, 0, 1, DATA), extent, data=bytes(PAGE)))


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, 2 * PAGE])
def test_a_wrong_length_spoils_the_answer(size: int) -> None:
    with pytest.raises(BadAnswerError, match="bytes of data for"):
        check(batch((0, 0, 1, DATA), data=bytes(size)))


def test_data_that_belongs_to_no_extent_spoils_the_answer() -> None:
    with pytest.raises(BadAnswerError, match="bytes of data for 0"):
        check(batch((0, 0, 1, ZERO), data=bytes(PAGE)))


@pytest.mark.parametrize("position", [0, PAGE // 2, 2 * PAGE - 1])
@pytest.mark.parametrize("pages", [2, 8])
def test_a_flipped_bit_spoils_the_answer(position: int, pages: int) -> None:
    message = batch((0, 0, pages, DATA))
    data = bytearray(message.data)
    data[position] ^= 1
    message.data = bytes(data)
    with pytest.raises(BadAnswerError, match="checksum"):
        check(message)


def test_a_missing_checksum_spoils_the_answer() -> None:
    message = batch((0, 0, 1, DATA))
    message.ClearField("checksum")
    with pytest.raises(BadAnswerError, match="checksum"):
        check(message)


@pytest.mark.parametrize("generation", [0, GENERATION - 1, GENERATION + 1, BIGGEST])
def test_another_generation_spoils_the_answer(generation: int) -> None:
    message = batch((0, 0, 1, ZERO))
    message.generation = generation
    with pytest.raises(BadAnswerError, match="the source VM has run"):
        check(message)


def test_extents_are_bounded() -> None:
    assert len(check(batch(*[(0, 0, 1, ZERO)] * EXTENTS_MAX)).extents) == EXTENTS_MAX
    with pytest.raises(BadAnswerError, match="extents"):
        check(batch(*[(0, 0, 1, ZERO)] * (EXTENTS_MAX + 1)))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.integers(0, 12) | st.integers(0, BIGGEST),
            st.integers(0, 12) | st.integers(0, BIGGEST),
            st.integers(0, 9),
        ),
        max_size=5,
    ),
    st.integers(0, 3).map(lambda pages: pages * PAGE) | st.integers(0, 3 * PAGE),
)
def test_whatever_passes_lies_within_memory_and_has_its_bytes(
    extents: list[tuple[int, int, int, int]], size: int
) -> None:
    try:
        answer = check(batch(*extents, data=bytes(size)))
    except BadAnswerError:
        return
    expected = 0
    for run, result in answer.extents:
        assert run.count >= 1
        region = LAYOUT.region_of_page(run.first)
        assert run.end <= region.end_page
        expected += run.count * region.page_size_bytes if result is ExtentResult.DATA else 0
    assert size == expected


def test_a_request_names_regions_and_their_own_pages() -> None:
    runs = (PageRun(PageIndex(2), 3), PageRun(PageIndex(9), 1), PageRun(PageIndex(10), 4))
    request = request_of(Fetch(5, Priority.VMM, runs, 0), LAYOUT)
    assert (request.request_id, request.priority) == (5, pb.PRIORITY_VMM)
    assert [(part.region, part.first_page, part.page_count) for part in request.ranges] == [
        (0, 2, 3),
        (1, 1, 1),
        (2, 0, 4),
    ]


def test_priorities_are_those_of_the_wire() -> None:
    assert {priority.name: priority.value for priority in Priority} == {
        name.removeprefix("PRIORITY_"): value for name, value in pb.Priority.items() if value
    }


def test_more_requests_done_than_anybody_holds() -> None:
    too_many = tuple(range(DONE_MAX + 1))
    with pytest.raises(BadAnswerError, match="requests done"):
        verify(decode_batch(batch((0, 0, 1, ZERO), done=too_many).SerializeToString()), LAYOUT, GENERATION)
