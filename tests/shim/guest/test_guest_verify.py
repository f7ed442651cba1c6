"""verify_ram against a model of the guest, stopped anywhere, and with every kind of damage."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryFile

import pytest
from farfault_cli.errors import VerificationError
from farfault_shim.guest import GuestKind, GuestParameters, WorkerState, read_class_steps, read_mailboxes, verify_ram
from farfault_shim.guest.addresses import mailbox_address
from farfault_shim.guest.parameters import second_word_offset
from farfault_shim.guest.verify import PROBLEMS_MAX, RamCheck
from guest_model import GuestModel
from hypothesis import given
from hypothesis import strategies as st

PAGES = 24
PARAMETERS = GuestParameters(
    vcpus=2, low_bytes=10 * 4096, high_bytes=(PAGES - 10) * 4096, data_start=2 << 20, kind=GuestKind.RANDOM
)
FILL_STEPS = 2 + PAGES // 2 * 3 + 2


@contextmanager
def guest_stopped_after(steps: int, parameters: GuestParameters = PARAMETERS) -> Iterator[int]:
    """A RAM file of a guest whose vCPUs have done so many stores each."""
    with TemporaryFile() as file:
        fd = file.fileno()
        last = parameters.low_pages + parameters.high_pages - 1
        os.ftruncate(fd, parameters.file_offset_of(last) + 4096)
        for vcpu in range(parameters.vcpus):
            model = GuestModel(fd, parameters, vcpu)
            for _ in itertools.islice(model.run(), steps):
                pass
        yield fd


def check(fd: int, parameters: GuestParameters = PARAMETERS) -> RamCheck:
    return verify_ram(fd, parameters, read_mailboxes(fd, parameters.vcpus))


@given(steps=st.integers(2, 400))
def test_guest_stopped_anywhere_is_right(steps: int) -> None:
    with guest_stopped_after(steps) as fd:
        result = check(fd)
        assert result.ok, result.problems
        assert result.pages == PAGES
        result.raise_if_wrong()


@pytest.mark.parametrize("kind", [GuestKind.ZIPF, GuestKind.IDLE])
@given(steps=st.integers(2, 600))
def test_skewed_guest_stopped_anywhere_is_right(kind: GuestKind, steps: int) -> None:
    parameters = replace(PARAMETERS, kind=kind)
    with guest_stopped_after(steps, parameters) as fd:
        result = check(fd, parameters)
        assert result.ok, result.problems
        assert result.pages == PAGES


@pytest.mark.parametrize("change", [-1, 1, 2])
def test_page_of_a_skewed_guest_that_missed_a_visit_is_found(change: int) -> None:
    parameters = replace(PARAMETERS, kind=GuestKind.ZIPF)
    with guest_stopped_after(FILL_STEPS + 400, parameters) as fd:
        skew = parameters.skew
        assert skew is not None
        upcoming = skew.upcoming(read_class_steps(fd, 1))
        page = parameters.slice_of(1)[next(page for page in range(skew.pages) if page not in upcoming)]
        for word in (0, second_word_offset(1)):
            place = parameters.file_offset_of(page) + word
            value = int.from_bytes(os.pread(fd, 8, place), "little") + change
            os.pwrite(fd, (value % (1 << 64)).to_bytes(8, "little"), place)
        result = check(fd, parameters)
        assert result.wrong == 1
        assert f"data page {page} " in result.problems[0]


def test_only_one_page_of_a_skewed_guest_may_be_ahead() -> None:
    parameters = replace(PARAMETERS, kind=GuestKind.ZIPF)
    with guest_stopped_after(FILL_STEPS, parameters) as fd:
        skew = parameters.skew
        assert skew is not None
        upcoming = sorted(skew.upcoming(read_class_steps(fd, 0)))
        for wrong, page in enumerate(upcoming):
            place = parameters.file_offset_of(page)
            value = int.from_bytes(os.pread(fd, 8, place), "little") + 1
            os.pwrite(fd, (value % (1 << 64)).to_bytes(8, "little"), place)
            assert check(fd, parameters).wrong == wrong


@pytest.mark.parametrize("step_bytes", [4096, 3 * 4096, 2 << 20])
def test_pages_far_apart_are_all_checked(step_bytes: int) -> None:
    parameters = GuestParameters(low_bytes=5 * step_bytes, data_start=2 << 20, step_bytes=step_bytes)
    with guest_stopped_after(40, parameters) as fd:
        result = check(fd, parameters)
        assert (result.pages, result.wrong) == (5, 0)
        os.pwrite(fd, b"\x01", parameters.file_offset_of(4) + second_word_offset(0))
        assert check(fd, parameters).wrong == 1


def lost(fd: int, place: int) -> None:
    os.pwrite(fd, bytes(4096), place)


def another(fd: int, place: int) -> None:
    os.pwrite(fd, os.pread(fd, 4096, PARAMETERS.file_offset_of(0)), place)


def one_bit(fd: int, place: int) -> None:
    byte = os.pread(fd, 1, place + 5)
    os.pwrite(fd, bytes([byte[0] ^ 16]), place + 5)


def two_rounds_old(fd: int, place: int) -> None:
    for word in (place, place + second_word_offset(1)):
        value = int.from_bytes(os.pread(fd, 8, word), "little") - 2
        os.pwrite(fd, (value % (1 << 64)).to_bytes(8, "little"), word)


@pytest.mark.parametrize("damage", [lost, another, one_bit, two_rounds_old])
@pytest.mark.parametrize("steps", [FILL_STEPS + 100, FILL_STEPS + 3 * 37])
def test_damaged_page_is_found(damage: Callable[[int, int], None], steps: int) -> None:
    with guest_stopped_after(steps) as fd:
        page = PARAMETERS.slice_of(1)[5]
        damage(fd, PARAMETERS.file_offset_of(page))
        result = check(fd)
        assert not result.ok
        assert f"data page {page} at {PARAMETERS.address_of(page):#x} of vCPU 1" in result.problems[0]
        with pytest.raises(VerificationError, match=f"data page {page} "):
            result.raise_if_wrong()


@pytest.mark.parametrize("place_in_order", [0, 5, 11])
def test_page_one_round_old_or_new_is_found(place_in_order: int) -> None:
    """Each word alone could be right; only the order of the round tells."""
    with guest_stopped_after(FILL_STEPS + 37 + 3 * 8) as fd:
        mailbox = read_mailboxes(fd, 1)[0]
        assert mailbox.touched - 12 * mailbox.passes == 8
        page = list(PARAMETERS.round_order(0, mailbox.passes + 1))[place_in_order]
        place = PARAMETERS.file_offset_of(page)
        for word in (place, place + second_word_offset(0)):
            value = int.from_bytes(os.pread(fd, 8, word), "little") + (-1 if place_in_order < 8 else 1)
            os.pwrite(fd, (value % (1 << 64)).to_bytes(8, "little"), word)
        result = check(fd)
        assert result.wrong == 1
        assert f"data page {page} " in result.problems[0]


def test_page_lost_during_the_fill_is_found() -> None:
    with guest_stopped_after(FILL_STEPS - 10) as fd:
        assert read_mailboxes(fd, 1)[0].state is WorkerState.FILL
        page = next(PARAMETERS.round_order(0, 0))
        lost(fd, PARAMETERS.file_offset_of(page))
        result = check(fd)
        assert result.wrong == 1
        assert f"data page {page} " in result.problems[0]


def test_stale_ram_is_right_only_while_a_guest_that_was_reset_fills_again() -> None:
    with guest_stopped_after(FILL_STEPS - 10) as fd:
        page = list(PARAMETERS.round_order(0, 0))[-1]
        os.pwrite(fd, b"stale", PARAMETERS.file_offset_of(page))
        assert check(fd).wrong == 1
        os.pwrite(fd, (2).to_bytes(8, "little"), mailbox_address(0) + 112)
        assert check(fd).ok


def test_impossible_count_is_wrong() -> None:
    with guest_stopped_after(FILL_STEPS + 50) as fd:
        os.pwrite(fd, (1 << 40).to_bytes(8, "little"), mailbox_address(0) + 8)
        assert "vCPU 0 says that it has done" in check(fd).problems[0]


def test_errors_that_the_guest_reports_count() -> None:
    with guest_stopped_after(FILL_STEPS) as fd:
        os.pwrite(fd, (3).to_bytes(8, "little"), mailbox_address(1) + 16)
        assert "vCPU 1 reports 3 errors" in check(fd).problems[0]


def test_vcpu_that_never_started_is_wrong() -> None:
    with guest_stopped_after(FILL_STEPS) as fd:
        os.pwrite(fd, bytes(128), mailbox_address(0))
        assert check(fd).problems == ["vCPU 0 has not started"]


def test_empty_ram_behind_good_mailboxes_is_wrong_everywhere_but_said_briefly() -> None:
    with guest_stopped_after(FILL_STEPS + 80) as fd:
        os.ftruncate(fd, PARAMETERS.data_start)
        result = check(fd)
        assert result.wrong >= PAGES
        assert len(result.problems) == PROBLEMS_MAX


def test_number_of_mailboxes_must_fit() -> None:
    with guest_stopped_after(FILL_STEPS) as fd, pytest.raises(ValueError, match="1 mailboxes for 2 vCPUs"):
        verify_ram(fd, PARAMETERS, read_mailboxes(fd, 1))
