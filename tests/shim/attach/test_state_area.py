"""The memory that VMM and receiver share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from farfault_shim.attach import state_area
from farfault_shim.attach.state_area import StateArea
from farfault_shim.attach.wire import (
    SLOTS_MAX,
    SLOTS_SEQ_OFFSET,
    STATE_BYTES,
    VCPUS_MAX,
    ProtocolError,
    Slot,
    VcpuCounters,
)
from farfault_shim.layout import FlatOffset, Gpa


@pytest.fixture
def memfd() -> Iterator[int]:
    descriptor = os.memfd_create("farfault-test-state", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, STATE_BYTES)
    yield descriptor
    os.close(descriptor)


def _slot(index: int) -> Slot:
    return Slot(index, 2, Gpa(index << 20), 1 << 20, FlatOffset(index << 20))


def test_a_reader_sees_what_the_writer_wrote(memfd: int) -> None:
    writer = StateArea(memfd, writable=True)
    reader = StateArea(memfd)
    assert reader.slots() == []
    assert reader.vcpus() == {}
    slots = [_slot(0), _slot(7)]
    counters = VcpuCounters(1, 2, 3, 4, 5, 6, 7, 8, 1)
    writer.write_slots(slots)
    writer.write_counters(1023, counters)
    assert reader.slots() == slots
    assert reader.vcpus() == {1023: counters}
    assert reader.counters(1023) == counters
    writer.write_slots([])
    assert reader.slots() == []
    reader.close()
    writer.close()


def test_all_slots_and_vcpus_fit(memfd: int) -> None:
    area = StateArea(memfd, writable=True)
    slots = [_slot(index) for index in range(SLOTS_MAX)]
    area.write_slots(slots)
    for vcpu in range(VCPUS_MAX):
        area.write_counters(vcpu, VcpuCounters(0, 0, 0, 0, 0, 0, 0, vcpu + 1, 0))
    assert area.slots() == slots
    assert len(area.vcpus()) == VCPUS_MAX
    area.close()


def test_a_writer_that_stopped_in_a_change_is_an_error(memfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_area, "SEQLOCK_TRIES_MAX", 3)
    StateArea(memfd, writable=True).close()
    os.pwrite(memfd, b"\1\0\0\0", SLOTS_SEQ_OFFSET)
    area = StateArea(memfd)
    with pytest.raises(ProtocolError, match="do not settle"):
        area.slots()
    area.close()


def test_a_change_during_the_read_is_read_again(memfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    area = StateArea(memfd, writable=True)
    area.write_slots([_slot(1)])
    sequences = iter([2, 3, 3, 3, 4, 4])
    monkeypatch.setattr(area, "_sequence", lambda: next(sequences))
    assert area.slots() == [_slot(1)]
    assert list(sequences) == []
    monkeypatch.undo()
    area.close()


@pytest.mark.parametrize("size", [0, 4096, STATE_BYTES - 1])
def test_a_small_descriptor_is_refused(size: int) -> None:
    descriptor = os.memfd_create("farfault-test-state")
    os.ftruncate(descriptor, size)
    with pytest.raises(ProtocolError):
        StateArea(descriptor)
    os.close(descriptor)


def test_a_descriptor_of_something_else_is_refused(memfd: int) -> None:
    with pytest.raises(ProtocolError, match="not a state area"):
        StateArea(memfd)
    reading, writing = os.pipe()
    with pytest.raises(ProtocolError, match="cannot be mapped"):
        StateArea(reading)
    os.close(reading)
    os.close(writing)
