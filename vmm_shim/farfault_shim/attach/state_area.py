"""The memory that a VMM shares with its receiver: memslots and counters. Outlives either side's restart."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Final

from farfault_shim.attach.wire import (
    SLOT,
    SLOTS_MAX,
    SLOTS_SEQ_OFFSET,
    STATE_BYTES,
    STATE_HEAD,
    STATE_MAGIC,
    VCPU_COUNTERS,
    VCPUS_MAX,
    VERSION,
    ProtocolError,
    Slot,
    VcpuCounters,
)
from farfault_shim.layout import FlatOffset, Gpa

SEQLOCK_TRIES_MAX: Final = 10_000
_VCPUS_OFFSET: Final = STATE_HEAD.size + SLOTS_MAX * SLOT.size


class StateArea:
    """The state memfd, mapped. A receiver reads it; the reference VMM writes it (the C library writes its own).

    Args:
        descriptor: a memfd of at least `STATE_BYTES`; it is not kept.
        writable: map it for writing.

    Raises:
        ProtocolError: too small, or not a state area.
    """

    def __init__(self, descriptor: int, *, writable: bool = False) -> None:
        self._slots: list[Slot] = []
        self._slots_sequence = -1
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._memory = mmap.mmap(descriptor, STATE_BYTES, flags=mmap.MAP_SHARED, prot=access)
        except (ValueError, OSError) as error:
            raise ProtocolError(f"state area cannot be mapped: {error}") from error
        if writable:
            STATE_HEAD.pack_into(self._memory, 0, STATE_MAGIC, VERSION, 0, 0, 0)
        if STATE_HEAD.unpack_from(self._memory)[:2] != (STATE_MAGIC, VERSION):
            raise ProtocolError("the descriptor named state is not a state area of this version")

    def slots(self) -> list[Slot]:
        """The memslots in use, read under the seqlock; the same list for as long as they have not changed.

        Raises:
            ProtocolError: the writer stopped in the middle of a change.
        """
        for _ in range(SEQLOCK_TRIES_MAX):
            before = self._sequence()
            if before == self._slots_sequence:
                return self._slots
            data = self._memory[STATE_HEAD.size : _VCPUS_OFFSET]
            if before % 2 == 0 and before == self._sequence():
                self._slots = [
                    Slot(slot_id, flags, Gpa(gpa), size, FlatOffset(offset))
                    for slot_id, flags, gpa, size, offset in SLOT.iter_unpack(data)
                    if size
                ]
                self._slots_sequence = before
                return self._slots
        raise ProtocolError("the VMM's memslots do not settle")

    def write_slots(self, slots: Sequence[Slot]) -> None:
        """Replaces all memslots."""
        assert len(slots) <= SLOTS_MAX
        self._bump()
        packed = b"".join(SLOT.pack(*slot) for slot in slots)
        self._memory[STATE_HEAD.size : _VCPUS_OFFSET] = packed.ljust(_VCPUS_OFFSET - STATE_HEAD.size, b"\0")
        self._bump()

    def counters(self, vcpu: int) -> VcpuCounters:
        return VcpuCounters(*VCPU_COUNTERS.unpack_from(self._memory, _VCPUS_OFFSET + vcpu * VCPU_COUNTERS.size))

    def write_counters(self, vcpu: int, counters: VcpuCounters) -> None:
        VCPU_COUNTERS.pack_into(self._memory, _VCPUS_OFFSET + vcpu * VCPU_COUNTERS.size, *counters)

    def vcpus(self) -> dict[int, VcpuCounters]:
        """Counters of every vCPU that has a thread."""
        found: dict[int, VcpuCounters] = {}
        for vcpu, fields in enumerate(VCPU_COUNTERS.iter_unpack(self._memory[_VCPUS_OFFSET:STATE_BYTES])):
            counters = VcpuCounters(*fields)
            if counters.thread_id:
                found[vcpu] = counters
        assert len(found) <= VCPUS_MAX
        return found

    def close(self) -> None:
        self._memory.close()

    def _sequence(self) -> int:
        return int.from_bytes(self._memory[SLOTS_SEQ_OFFSET : SLOTS_SEQ_OFFSET + 4], "little")

    def _bump(self) -> None:
        value = (self._sequence() + 1) & 0xFFFF_FFFF
        self._memory[SLOTS_SEQ_OFFSET : SLOTS_SEQ_OFFSET + 4] = value.to_bytes(4, "little")
