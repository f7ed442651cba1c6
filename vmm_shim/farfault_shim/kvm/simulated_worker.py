"""The self-verifying worker of ``guest/guest.S``, done in Python one memory page at a time; in rounds only, no skew.

`SimulatedWorker.step` does the work up to the next page; a step that meets an absent page raises and is done
again from its start, as an instruction is. All state lies in the registers of `Registers`, so that a vCPU
can be saved and loaded: ``rip`` is `WORKER` plus the number of the phase.
"""

from __future__ import annotations

import dataclasses
import struct
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from farfault_shim.guest.addresses import (
    MAILBOX_BYTES,
    PARAMETERS,
    WORKER,
    clock_address,
    histogram_address,
    mailbox_address,
)
from farfault_shim.guest.mailbox import Mailbox, WorkerState
from farfault_shim.guest.parameters import BLOCK_BYTES, HEADER, first_word, second_word_offset
from farfault_shim.kvm.registers import Registers

_MASK_64: Final = (1 << 64) - 1
_FIELD: Final = {field.name: 8 * index for index, field in enumerate(dataclasses.fields(Mailbox))}
_CLEARED: Final = tuple(place for name, place in _FIELD.items() if name not in ("boots", "state"))
_BUCKETS: Final = 64
_TICKS_OF_A_LOAD: Final = 1000
"""Time is virtual: every load takes the same, one that had to wait as well."""
_BUCKET: Final = _TICKS_OF_A_LOAD.bit_length() - 1
PVCLOCK: Final = struct.Struct("<IIQQIbB2x")
"""struct pvclock_vcpu_time_info: version, padding, tsc_timestamp, system_time, multiplier, shift, flags."""


class WorkerMemory(Protocol):
    """Guest memory in words of 8 bytes."""

    def access(self, gpa: int, *, is_write: bool = False, value: int = 0) -> int:
        """A load or a store. Raises PageFault where the page is absent."""

    def fetch(self, gpa: int) -> None:
        """An instruction fetch. Raises PageFault where the page is absent."""

    def load_bytes(self, gpa: int, size_bytes: int) -> bytes:
        """Loads from the page that was accessed last."""

    def store(self, gpa: int, value: int) -> None:
        """Stores to the page that was accessed last."""


class Phase(IntEnum):
    """What comes next."""

    START = 0
    CLEAR_HISTOGRAM = 1
    ROUND = 2
    FIND_PAGE = 3
    FILL = 4
    COUNT_FILLED = 5
    LOAD = 6
    CHECK = 7
    COUNT_TICKS = 8
    STORE = 9
    COUNT_TOUCHED = 10
    READ_CLOCK = 11
    REPORT_CLOCK = 12
    END_ROUND = 13


class _Parameters(NamedTuple):
    """The block's fields, in its order."""

    vcpus: int
    low_start: int
    low_pages: int
    high_start: int
    pages_per_vcpu: int
    step_bytes: int
    order_multiplier: int
    order_increment: int
    order_mask: int
    order_shift: int
    clock_interval_pages: int
    mapped_gib: int
    skew_classes: int
    round_visits: int
    pause_ticks: int

    def address_of(self, page: int) -> int:
        if page < self.low_pages:
            return self.low_start + page * self.step_bytes
        return self.high_start + (page - self.low_pages) * self.step_bytes


_BLOCK: Final = struct.Struct(f"<{len(_Parameters._fields)}Q")
assert HEADER.size + _BLOCK.size == BLOCK_BYTES


class SimulatedWorker:
    """One vCPU's work.

    Args:
        memory: of the guest as this vCPU sees it.
    """

    def __init__(self, memory: WorkerMemory) -> None:
        self._memory = memory
        self._parameters: _Parameters | None = None
        self.ticks = 0
        """Steps of 1000, at 1 GHz: the time stamp counter."""
        self.registers = Registers()
        self._phases = (
            self._start,
            self._clear_histogram,
            self._round,
            self._find_page,
            self._fill,
            self._count_filled,
            self._load,
            self._check,
            self._count_ticks,
            self._store,
            self._count_touched,
            self._read_clock,
            self._report_clock,
            self._end_round,
        )

    @property
    def registers(self) -> Registers:
        """rdi: vCPU; rbx, r10, r11: state, steps left and increment of the order; r12: round; rdx: data page;
        rbp, rax: words seen; r9: pages until the clock is read; rcx, rsi: clock and its version."""
        return Registers(
            rax=self._second,
            rbx=self._order,
            rcx=self._clock_ns,
            rdx=self._page,
            rsi=self._clock_version,
            rdi=self._vcpu,
            rbp=self._first,
            r9=self._until_clock,
            r10=self._steps_left,
            r11=self._increment,
            r12=self._number,
            rip=WORKER + self._phase,
        )

    @registers.setter
    def registers(self, value: Registers) -> None:
        self._second, self._order, self._clock_ns, self._page = value.rax, value.rbx, value.rcx, value.rdx
        self._clock_version, self._vcpu, self._first = value.rsi, value.rdi, value.rbp
        self._until_clock, self._steps_left, self._increment = value.r9, value.r10, value.r11
        self._number = value.r12
        self._phase = value.rip - WORKER
        self._parameters = None

    @property
    def can_run(self) -> bool:
        """The registers are the worker's."""
        return 0 <= self._phase < len(self._phases)

    def begin(self) -> None:
        """Fetches the next instruction. Raises PageFault."""
        self._memory.fetch(WORKER)

    def step(self) -> None:
        """Does one phase. Raises PageFault; then nothing has changed and the step is to be done again."""
        self._phases[self._phase]()
        self.ticks += _TICKS_OF_A_LOAD

    # ---- phases, each with the one access that may fault first -------------------------------------

    def _start(self) -> None:
        mailbox = mailbox_address(self._vcpu)
        boots = self._memory.access(mailbox + _FIELD["boots"])
        for place in _CLEARED:
            self._memory.store(mailbox + place, 0)
        self._memory.store(mailbox + _FIELD["boots"], boots + 1)
        self._memory.store(mailbox + _FIELD["state"], WorkerState.FILL)
        self._number = 0
        self._phase = Phase.CLEAR_HISTOGRAM

    def _clear_histogram(self) -> None:
        histogram = histogram_address(self._vcpu)
        self._memory.access(histogram, is_write=True)
        for bucket in range(1, _BUCKETS):
            self._memory.store(histogram + 8 * bucket, 0)
        self._until_clock = 0
        self._phase = Phase.ROUND

    def _round(self) -> None:
        self._parameters = None
        parameters = self._read_parameters()
        if not self._until_clock:
            self._until_clock = parameters.clock_interval_pages
        self._increment = (1 + self._number * parameters.order_increment) & _MASK_64
        self._order = parameters.order_mask
        self._steps_left = parameters.order_mask + 1
        self._phase = Phase.FIND_PAGE

    def _find_page(self) -> None:
        parameters = self._parameters or self._read_parameters()
        order, left = self._order, self._steps_left
        while left:
            left -= 1
            order = (order * parameters.order_multiplier + self._increment) & parameters.order_mask
            index = order ^ (order >> parameters.order_shift)
            if index < parameters.pages_per_vcpu:
                self._page = self._vcpu * parameters.pages_per_vcpu + index
                self._phase = Phase.LOAD if self._number else Phase.FILL
                break
        else:
            self._phase = Phase.END_ROUND
        self._order, self._steps_left = order, left

    def _fill(self) -> None:
        self._store_both(first_word(self._page), Phase.COUNT_FILLED)

    def _count_filled(self) -> None:
        self._count("filled")
        self._phase = Phase.FIND_PAGE

    def _load(self) -> None:
        address = self._address()
        self._first = self._memory.access(address)
        self._second = int.from_bytes(self._memory.load_bytes(address + second_word_offset(self._vcpu), 8), "little")
        self._phase = Phase.CHECK

    def _check(self) -> None:
        mailbox = mailbox_address(self._vcpu)
        errors = self._memory.access(mailbox + _FIELD["errors"])
        expected = (first_word(self._page) + self._number - 1) & _MASK_64
        if self._first != expected or self._second != expected:
            self._report_errors(errors, expected)
        ticks = int.from_bytes(self._memory.load_bytes(mailbox + _FIELD["access_ticks"], 8), "little")
        self._memory.store(mailbox + _FIELD["access_ticks"], ticks + _TICKS_OF_A_LOAD)
        self._memory.store(mailbox + _FIELD["access_max_ticks"], _TICKS_OF_A_LOAD)
        self._phase = Phase.COUNT_TICKS

    def _count_ticks(self) -> None:
        bucket = histogram_address(self._vcpu) + 8 * _BUCKET
        self._memory.store(bucket, self._memory.access(bucket) + 1)
        self._phase = Phase.STORE

    def _store(self) -> None:
        self._store_both((first_word(self._page) + self._number) & _MASK_64, Phase.COUNT_TOUCHED)

    def _count_touched(self) -> None:
        self._count("touched")
        self._until_clock = (self._until_clock - 1) & _MASK_64
        self._phase = Phase.FIND_PAGE if self._until_clock else Phase.READ_CLOCK

    def _read_clock(self) -> None:
        clock = clock_address(self._vcpu)
        self._memory.access(clock)
        version, _, timestamp, system_ns, multiplier, shift, _ = PVCLOCK.unpack(
            self._memory.load_bytes(clock, PVCLOCK.size)
        )
        parameters = self._parameters or self._read_parameters()
        self._until_clock = parameters.clock_interval_pages
        self._phase = Phase.FIND_PAGE
        if multiplier and not version % 2:
            ticks = self.ticks - timestamp
            ticks = ticks << shift if shift >= 0 else ticks >> -shift
            self._clock_ns = (system_ns + (ticks * multiplier >> 32)) & _MASK_64
            self._clock_version = version
            self._phase = Phase.REPORT_CLOCK

    def _report_clock(self) -> None:
        mailbox = mailbox_address(self._vcpu)
        reads = self._memory.access(mailbox + _FIELD["clock_reads"])
        fields = Mailbox.unpack(self._memory.load_bytes(mailbox, MAILBOX_BYTES))
        step_ns = self._clock_ns - fields.clock_last_ns
        if reads and step_ns < 0:
            self._memory.store(mailbox + _FIELD["clock_backwards"], fields.clock_backwards + 1)
        elif reads and step_ns > fields.clock_step_max_ns:
            self._memory.store(mailbox + _FIELD["clock_step_max_ns"], step_ns)
        self._memory.store(mailbox + _FIELD["clock_last_ns"], self._clock_ns)
        self._memory.store(mailbox + _FIELD["clock_version"], self._clock_version)
        self._memory.store(mailbox + _FIELD["clock_reads"], reads + 1)
        self._phase = Phase.FIND_PAGE

    def _end_round(self) -> None:
        mailbox = mailbox_address(self._vcpu)
        self._memory.access(mailbox + _FIELD["passes"], is_write=True, value=self._number)
        self._memory.store(mailbox + _FIELD["state"], WorkerState.VERIFY)
        self._number += 1
        self._phase = Phase.ROUND

    # ---- parts of phases -----------------------------------------------------------------------------

    def _read_parameters(self) -> _Parameters:
        place = PARAMETERS + HEADER.size
        self._memory.access(place)
        self._parameters = _Parameters._make(_BLOCK.unpack(self._memory.load_bytes(place, _BLOCK.size)))
        return self._parameters

    def _address(self) -> int:
        return (self._parameters or self._read_parameters()).address_of(self._page)

    def _store_both(self, word: int, then: Phase) -> None:
        address = self._address()
        self._memory.access(address, is_write=True, value=word)
        self._memory.store(address + second_word_offset(self._vcpu), word)
        self._phase = then

    def _count(self, name: str) -> None:
        place = mailbox_address(self._vcpu) + _FIELD[name]
        self._memory.store(place, self._memory.access(place) + 1)

    def _report_errors(self, errors: int, expected: int) -> None:
        mailbox = mailbox_address(self._vcpu)
        address = self._address()
        for seen, place in ((self._first, address), (self._second, address + second_word_offset(self._vcpu))):
            if seen != expected:
                errors += 1
                if errors == 1:
                    self._memory.store(mailbox + _FIELD["error_gpa"], place)
                    self._memory.store(mailbox + _FIELD["error_seen"], seen)
                    self._memory.store(mailbox + _FIELD["error_expected"], expected)
        self._memory.store(mailbox + _FIELD["errors"], errors)
