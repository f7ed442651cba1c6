"""Virtual time: events in the order of their time, then of their making."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

EVENTS_MAX = 40_000
"""A run that needs more goes round in circles."""


@dataclass
class Clock:
    now: float = 0.0
    events: int = 0
    _heap: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """`act` happens `delay_s` from now."""
        self.events += 1
        assert self.events < EVENTS_MAX, "the simulation goes round in circles"
        heapq.heappush(self._heap, (self.now + delay_s, self.events, act))

    def run(self, until: Callable[[], bool], deadline: float) -> None:
        """Lets things happen until something holds; at the deadline it has to."""
        while not until():
            assert self._heap, "nothing happens any more"
            at, _, act = heapq.heappop(self._heap)
            assert at <= deadline, f"not done after {deadline} s"
            self.now = at
            act()
