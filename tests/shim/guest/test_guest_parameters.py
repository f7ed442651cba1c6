"""Parameters of the self-verifying guest: which pages, whose, in what order."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from farfault_shim.guest.addresses import clock_address, histogram_address, mailbox_address
from farfault_shim.guest.parameters import (
    BLOCK_BYTES,
    BLOCK_IN_IMAGE,
    BLOCK_VERSION,
    HEADER,
    IDLE_PAUSE_TICKS,
    IMAGE_BYTES,
    GuestKind,
    GuestParameters,
    Machine,
    first_word,
    worker_place,
)
from hypothesis import given
from hypothesis import strategies as st

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("name", "ram_bytes", "low_ram_bytes"),
    [
        ("pc", 128 * MIB, 128 * MIB),
        ("pc", 0xE000_0000 - MIB, 0xE000_0000 - MIB),
        ("pc", 0xE000_0000, 3 * GIB),
        ("pc-i440fx-7.2", 4 * GIB, 3 * GIB),
        ("q35", 0xB000_0000 - MIB, 0xB000_0000 - MIB),
        ("q35", 0xB000_0000, 2 * GIB),
        ("pc-q35-7.2", 16 * GIB, 2 * GIB),
        ("flat", 16 * GIB, 16 * GIB),
    ],
)
def test_ram_is_split_as_by_the_machine(name: str, ram_bytes: int, low_ram_bytes: int) -> None:
    assert Machine.of_name(name).low_ram_bytes(ram_bytes) == low_ram_bytes


@pytest.mark.parametrize("name", ["microvm", "virt", "pc_q35", ""])
def test_unknown_machine_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="none of pc, q35, flat"):
        Machine.of_name(name)


def test_data_covers_all_ram_on_both_sides_of_the_hole() -> None:
    parameters = GuestParameters.for_ram(4 * GIB, 4, "q35")
    assert parameters.data_pages == (4 * GIB - 16 * MIB) // 4096
    last_low = parameters.low_pages - 1
    assert parameters.address_of(0) == 16 * MIB == parameters.file_offset_of(0)
    assert parameters.address_of(last_low) == 2 * GIB - 4096 == parameters.file_offset_of(last_low)
    assert parameters.address_of(last_low + 1) == 4 * GIB
    assert parameters.file_offset_of(last_low + 1) == 2 * GIB
    assert parameters.file_offset_of(parameters.low_pages + parameters.high_pages - 1) == 4 * GIB - 4096
    assert parameters.mapped_gib == 6


def test_page_limit_takes_half_from_each_side() -> None:
    parameters = GuestParameters.for_ram(4 * GIB, machine=Machine.PC, pages_max=1000)
    assert (parameters.low_pages, parameters.high_pages) == (500, 500)


def test_page_limit_without_high_ram_is_all_low() -> None:
    parameters = GuestParameters.for_ram(GIB, pages_max=1000)
    assert (parameters.low_pages, parameters.high_pages) == (1000, 0)


@given(
    pages=st.integers(1, 700),
    vcpus=st.integers(1, 9),
    round_number=st.integers(0, 2**64),
    kind=st.sampled_from([GuestKind.SEQUENTIAL, GuestKind.RANDOM]),
)
def test_each_round_visits_each_page_of_the_slice_once(
    pages: int, vcpus: int, round_number: int, kind: GuestKind
) -> None:
    parameters = GuestParameters(vcpus=vcpus, low_bytes=4096 * pages * vcpus, kind=kind)
    for vcpu in range(vcpus):
        order = list(parameters.round_order(vcpu, round_number))
        assert sorted(order) == list(parameters.slice_of(vcpu))
        if kind is GuestKind.SEQUENTIAL:
            assert order == sorted(order)


def test_random_rounds_differ_and_jump() -> None:
    parameters = GuestParameters(low_bytes=1000 * 4096, kind=GuestKind.RANDOM)
    orders = [list(parameters.round_order(0, number)) for number in range(8)]
    assert len({tuple(order) for order in orders}) == 8
    for order in orders:
        steps = [after - before for before, after in pairwise(order)]
        assert steps.count(1) < 20
        assert len(set(steps)) > 200


def test_an_idle_guest_uses_few_pages_and_rests() -> None:
    idle, zipf = (GuestParameters(low_bytes=1000 * 4096, kind=kind) for kind in (GuestKind.IDLE, GuestKind.ZIPF))
    assert (idle.visits_per_pass, zipf.visits_per_pass) == (31, 1000)
    last_three = lambda parameters: struct.unpack("<3Q", parameters.pack()[-24:])  # noqa: E731
    assert last_three(idle) == (5, 31, IDLE_PAUSE_TICKS)
    assert last_three(zipf) == (10, 1000, 0)
    assert GuestParameters(low_bytes=3 * 4096, kind=GuestKind.IDLE).visits_per_pass == 3
    assert last_three(GuestParameters(low_bytes=3 * 4096)) == (0, 3, 0)


def test_slices_are_disjoint_and_of_equal_length() -> None:
    parameters = GuestParameters(vcpus=3, low_bytes=100 * 4096)
    slices = [parameters.slice_of(vcpu) for vcpu in range(3)]
    assert [len(pages) for pages in slices] == [33] * 3
    assert sorted(page for pages in slices for page in pages) == list(range(99))


def test_first_words_are_distinct_and_never_zero() -> None:
    words = {first_word(page) for page in range(10_000)}
    assert len(words) == 10_000
    assert 0 not in words


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"vcpus": 0}, "vcpus=0"),
        ({"vcpus": 65}, "vcpus=65"),
        ({"step_bytes": 2048}, "step_bytes"),
        ({"step_bytes": 6000}, "step_bytes"),
        ({"low_bytes": 4095}, "low_bytes"),
        ({"low_bytes": 0}, "too few"),
        ({"vcpus": 17}, "too few"),
        ({"data_start": 1 << 20}, "data_start"),
        ({"low_ram_bytes": 16 << 20}, "past its RAM"),
        ({"low_bytes": 4 << 30, "high_bytes": 4096}, "below 4 GiB"),
        ({"low_bytes": 300 << 30}, "can map"),
        ({"clock_interval_pages": 0}, "clock_interval_pages"),
    ],
)
def test_wrong_parameters_are_refused_by_name(wrong: dict[str, int], words: str) -> None:
    values: dict[str, int] = {"low_bytes": 16 * 4096, **wrong}
    with pytest.raises(ValueError, match=words):
        GuestParameters(**values)  # type: ignore[arg-type]


def test_ram_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        GuestParameters.for_ram(8 * MIB)


def _image(worker_offset: int = 512, worker_bytes: int = 100, version: int = BLOCK_VERSION) -> bytes:
    image = bytearray(IMAGE_BYTES)
    HEADER.pack_into(image, BLOCK_IN_IMAGE, b"FARFAULT", version, worker_offset, worker_bytes)
    return bytes(image)


def test_apply_changes_the_block_only() -> None:
    image = _image()
    parameters = GuestParameters(vcpus=2, low_bytes=1 << 20)
    patched = parameters.apply(image)
    end = BLOCK_IN_IMAGE + BLOCK_BYTES
    assert len(patched) == IMAGE_BYTES
    assert patched[: BLOCK_IN_IMAGE + HEADER.size] == image[: BLOCK_IN_IMAGE + HEADER.size]
    assert patched[BLOCK_IN_IMAGE:end] == parameters.pack(worker_offset=512, worker_bytes=100)
    assert patched[end:] == image[end:]
    assert parameters.apply(patched) == patched
    assert worker_place(patched) == (512, 100)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "65536 bytes"),
        (bytes(IMAGE_BYTES), "no parameter block"),
        (_image(version=99), "version 99"),
        (_image(worker_bytes=0), "does not fit"),
        (_image(worker_bytes=4097), "does not fit"),
        (_image(worker_offset=BLOCK_IN_IMAGE), "does not fit"),
    ],
)
def test_apply_refuses_what_is_not_the_image(image: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GuestParameters(low_bytes=4096).apply(image)


def test_places_of_64_vcpus_do_not_overlap_and_stay_in_low_ram() -> None:
    ranges = [(mailbox_address(vcpu), 128) for vcpu in range(64)]
    ranges += [(histogram_address(vcpu), 512) for vcpu in range(64)]
    ranges += [(clock_address(vcpu), 4096) for vcpu in range(64)]
    ranges += [(0x1000, 0x2000), (0x7000, 4), (0x8000, 4096), (0x9000, 4096), (0xC000, 64 * 64)]
    ranges.sort()
    for (start, size), (after, _) in pairwise(ranges):
        assert start + size <= after
    assert sum(ranges[-1]) <= 0xA0000
    with pytest.raises(IndexError):
        mailbox_address(64)
