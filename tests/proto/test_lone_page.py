"""The exchange of one page as bytes, against the generated class and the general codec."""

from dataclasses import dataclass

import pytest
from farfault.checksum import batch_checksum
from farfault.codec import encode_batch, times_fields
from farfault.lone_page import ExpectedPage, LonePage, page_pieces, request_message
from farfault.v1 import pages_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

PAGE = 4096
UINT32 = st.integers(0, (1 << 32) - 1)
UINT64 = st.integers(0, (1 << 64) - 1)
DATA = bytes(range(256)) * (PAGE // 256)


@dataclass(frozen=True)
class Place:
    """What a request asks for."""

    request_id: int = 300
    region: int = 1
    page: int = 70_000
    generation: int = 9

    @property
    def asked(self) -> tuple[int, int, int]:
        return self.request_id, self.region, self.page

    def expected(self) -> ExpectedPage:
        return ExpectedPage(*self.asked, PAGE, self.generation)

    def answer(self, data: bytes = DATA, queue_us: int = 0, read_us: int = 0) -> bytes:
        return b"".join([*page_pieces(*self.asked, data, self.generation), times_fields(queue_us, read_us)])


PLACES = st.builds(Place, request_id=st.integers(1, (1 << 64) - 1), region=UINT32, page=UINT64, generation=UINT64)


@given(PLACES, st.sampled_from(sorted(pb.Priority.values())[1:]))
def test_a_request_is_what_the_generated_class_writes(place: Place, priority: int) -> None:
    request_id, region, page = place.asked
    wanted = pb.PageRange(region=region, first_page=page, page_count=1)
    generated = pb.FetchRequest(request_id=request_id, priority=priority, ranges=[wanted])
    assert request_message(request_id, priority, region, page) == generated.SerializeToString()


@given(PLACES, UINT32, UINT32)
def test_an_answer_is_what_the_general_codec_writes(place: Place, queue_us: int, read_us: int) -> None:
    extents = ((place.region, place.page, 1, pb.EXTENT_KIND_DATA),)
    checksum = batch_checksum((place.request_id,), extents, place.generation, (DATA,))
    assert place.answer(DATA, queue_us, read_us) == encode_batch(
        (place.request_id,),
        extents,
        checksum,
        DATA,
        place.generation,
        server_queue_us=queue_us,
        server_read_us=read_us,
    )


@given(PLACES, st.integers(0, (1 << 28) - 1), st.integers(0, (1 << 28) - 1))
def test_the_expected_answer_is_read(place: Place, queue_us: int, read_us: int) -> None:
    assert place.expected().read(place.answer(DATA, queue_us, read_us)) == LonePage(DATA, queue_us, read_us)


@given(st.data())
def test_a_flipped_bit_never_passes_for_the_page(data: st.DataObject) -> None:
    place = Place()
    answer = bytearray(place.answer(DATA, 5, 300))
    position = data.draw(st.integers(0, len(answer) - 1))
    answer[position] ^= 1 << data.draw(st.integers(0, 7))
    came = place.expected().read(bytes(answer))
    assert came is None or (came.data == DATA and position >= len(place.answer())), "the times are not covered"


@given(st.binary(max_size=40), st.integers(0, 4200))
def test_a_cut_or_lengthened_answer_is_something_else(more: bytes, length: int) -> None:
    place = Place()
    answer = place.answer(DATA, 5, 300)
    assert place.expected().read(answer[: min(length, len(answer) - 4)]) is None
    came = place.expected().read(answer + more)
    assert came == (None if more else LonePage(DATA, 5, 300))


@pytest.mark.parametrize(
    "other",
    [
        Place(request_id=301),
        Place(region=0),
        Place(page=70_001),
        Place(generation=8),
        Place(generation=0),
    ],
)
def test_an_answer_to_another_request_is_something_else(other: Place) -> None:
    assert Place().expected().read(other.answer()) is None


def test_pages_of_another_size_are_something_else() -> None:
    assert Place().expected().read(Place().answer(DATA[:2048])) is None
    assert Place().expected().read(Place().answer(DATA * 2)) is None


def test_zero_and_refused_pages_are_something_else() -> None:
    place = Place()
    for kind in (pb.EXTENT_KIND_ZERO, pb.EXTENT_KIND_NOT_FROZEN):
        extents = ((place.region, place.page, 1, kind),)
        checksum = batch_checksum((place.request_id,), extents, place.generation, ())
        answer = encode_batch((place.request_id,), extents, checksum, b"", place.generation)
        assert place.expected().read(answer) is None


def test_two_answers_in_one_are_something_else() -> None:
    place = Place()
    extents = ((1, 70_000, 1, 0), (1, 80_000, 1, 0))
    checksum = batch_checksum((300, 301), extents, place.generation, (DATA, DATA))
    assert place.expected().read(encode_batch((300, 301), extents, checksum, (DATA, DATA), place.generation)) is None
