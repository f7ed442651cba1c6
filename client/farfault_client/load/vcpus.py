"""The virtual vCPUs of one process: each with a pattern of its own, or its part of a trace."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence

from farfault_client.load.patterns import Listed, Pattern, pattern_for
from farfault_client.load.plan import PatternPlan
from farfault_client.load.present import PresentPages
from farfault_client.load.trace import Trace

HITS_IN_A_ROW_MAX = 64
"""A vCPU that touched this many present pages in a row goes to the next absent one, so that no run stands still."""


class Vcpus:
    """What vCPUs touch.

    Args:
        plan: the pattern.
        page_count: of the memory.
        numbers: of these vCPUs among all `total`; ignored for a trace, which names its own.
        total: vCPUs of the whole test.
        trace: this process's share of the trace, for REPLAY.

    Attributes:
        hits: accesses to pages that were present: no fault.
        is_exhausted: no vCPU has anything more to touch.
    """

    def __init__(
        self, plan: PatternPlan, page_count: int, numbers: Sequence[int], total: int, trace: Trace | None = None
    ) -> None:
        self._plan = plan
        self._page_count = page_count
        self._numbers = numbers
        self._total = total
        self._trace = trace
        found = _positions(trace) if trace is not None else {}
        self._positions = list(found.values())
        self._index_of = {number: index for index, number in enumerate(found)}
        self.rewind()

    def rewind(self) -> None:
        """Back to the first access."""
        self.hits = 0
        self._turn = 0
        self._exhausted: set[int] = set()
        self._random = random.Random(f"farfault load writes {self._plan.random_seed} {self._numbers[:1]}").random
        self._patterns: list[Pattern] = [self._pattern(index) for index in range(len(self))]
        self._last_was_write = bytearray(len(self))
        self._next_position = [0] * len(self)

    def __len__(self) -> int:
        return len(self._positions) if self._trace is not None else len(self._numbers)

    @property
    def is_exhausted(self) -> bool:
        return len(self._exhausted) == len(self)

    def in_turn(self) -> int | None:
        """The vCPU that an open loop lets go on next: by the trace, else one after the other; None: none has more."""
        if self._trace is None:
            return self._turn % len(self)
        if self._turn == len(self._trace):
            return None
        return self._index_of[self._trace.vcpus[self._turn]]

    def advance_turn(self) -> None:
        """The vCPU in turn has had it."""
        self._turn += 1

    def next_page(self, vcpu: int, present: PresentPages | None, *, is_open_loop: bool = False) -> int | None:
        """The page that the vCPU faults on next.

        Args:
            vcpu: index among these.
            present: pages that do not fault; None: every access does.
            is_open_loop: a trace is followed access by access; one that hits a present page is no fault.

        Returns:
            None where every page is present, or the trace's next access is a hit, or the vCPU has no more.
        """
        tries = HITS_IN_A_ROW_MAX
        if self._trace is not None:
            tries = 1 if is_open_loop else len(self._positions[vcpu]) + 1
        page: int | None = 0
        for _ in range(tries):
            page = self._access(vcpu)
            if page is None or present is None or page not in present:
                return page
            self.hits += 1
        return present.next_absent(page or 0) if self._trace is None and present is not None else None

    def was_write(self, vcpu: int) -> bool:
        """Whether the access that faulted last was a write."""
        return bool(self._last_was_write[vcpu])

    def _access(self, vcpu: int) -> int | None:
        page = self._patterns[vcpu].next_page()
        if page is None:
            self._exhausted.add(vcpu)
        elif self._trace is not None:
            position = self._positions[vcpu][self._next_position[vcpu]]
            self._next_position[vcpu] += 1
            self._last_was_write[vcpu] = self._trace.writes[position]
        elif self._plan.write_share:
            self._last_was_write[vcpu] = self._random() < self._plan.write_share
        return page

    def _pattern(self, index: int) -> Pattern:
        if self._trace is None:
            return pattern_for(self._plan, self._page_count, self._numbers[index], self._total)
        pages, positions = self._trace.pages, self._positions[index]
        return Listed(self._page_count, lambda at: pages[positions[at]] if at < len(positions) else None)


def _positions(trace: Trace) -> dict[int, array[int]]:
    """For each vCPU of a trace, in the order of its first access, where its accesses are."""
    found: dict[int, array[int]] = {}
    for position, vcpu in enumerate(trace.vcpus):
        found.setdefault(vcpu, array("Q")).append(position)
    return found
