"""The guest in Python: does to a RAM file what ``guest.S`` does to RAM, one store at a time."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator

from farfault_shim.guest.addresses import histogram_address, mailbox_address
from farfault_shim.guest.mailbox import CLASS_STEPS_BYTES, WorkerState
from farfault_shim.guest.parameters import GuestParameters, first_word, second_word_offset
from farfault_shim.guest.skew import Skew

_MASK_64 = (1 << 64) - 1
_PLACES = {"passes": 0, "touched": 8, "errors": 16, "state": 56, "filled": 104, "boots": 112}


class GuestModel:
    """One vCPU on a RAM file. `run` yields after each store to memory: stop anywhere."""

    def __init__(self, fd: int, parameters: GuestParameters, vcpu: int) -> None:
        self._fd = fd
        self._parameters = parameters
        self._vcpu = vcpu
        self._counts = dict.fromkeys(_PLACES, 0)

    def run(self) -> Iterator[None]:
        yield self._report("boots", 1)
        yield self._report("state", WorkerState.FILL)
        for page in self._parameters.round_order(self._vcpu, 0):
            yield from self._store_both(page, first_word(page))
            yield self._report("filled", self._counts["filled"] + 1)
        yield self._report("passes", 0)
        yield self._report("state", WorkerState.VERIFY)
        if self._parameters.skew is not None:
            yield from self._run_skewed(self._parameters.skew)
        for number in range(1, 1 << 64):
            for page in self._parameters.round_order(self._vcpu, number):
                yield from self._store_both(page, first_word(page) + number)
                yield self._report("touched", self._counts["touched"] + 1)
            yield self._report("passes", number)

    def _run_skewed(self, skew: Skew) -> Iterator[None]:
        pages, steps, rng = self._parameters.slice_of(self._vcpu), [0] * skew.classes, random.Random(self._vcpu)
        place = histogram_address(self._vcpu) + CLASS_STEPS_BYTES
        while True:
            number = rng.randrange(skew.classes)
            page = skew.page_at(number, steps[number])
            if page is not None:
                yield from self._store_both(pages[page], first_word(pages[page]) + (steps[number] >> number) + 1)
            steps[number] += 1
            yield self._store(place + 8 * number, steps[number])
            if page is not None:
                yield self._report("touched", self._counts["touched"] + 1)

    def _store_both(self, page: int, word: int) -> Iterator[None]:
        place = self._parameters.file_offset_of(page)
        yield self._store(place, word)
        yield self._store(place + second_word_offset(self._vcpu), word)

    def _report(self, name: str, value: int) -> None:
        self._counts[name] = value
        self._store(mailbox_address(self._vcpu) + _PLACES[name], value)

    def _store(self, place: int, word: int) -> None:
        os.pwrite(self._fd, struct.pack("<Q", word & _MASK_64), place)
