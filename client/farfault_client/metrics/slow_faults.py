"""The watchdog of faults: a thread that waits longer than a limit is reported once, and never killed.

It does no I/O besides its log lines and reads no clock. `look` finds threads that still wait; `ended` is told of
those that have gone on after more than the limit. Either reports a fault, the other knows that it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final, NamedTuple

from farfault_client.engine.states import Priority
from farfault_client.engine.waiters import Waiter

logger = logging.getLogger(__name__)

LIMIT_DEFAULT_S: Final = 1.0
LOOKS_PER_LIMIT: Final = 4
"""A fault is reported at the latest a quarter of the limit after it has become slow."""


class SlowFault(NamedTuple):
    """A fault that took longer than the limit and is over."""

    fault_id: str
    priority: Priority
    seconds: float


def fault_id_of(waiter: Waiter) -> str:
    """Names a fault in logs, exemplars and `farfault top`: when it began and for which page, both in hexadecimal."""
    return f"{int(waiter.since * 1e6):x}-{waiter.pages[0]:x}"


class SlowFaults:
    """Counts and logs faults that take longer than `limit_s`.

    Attributes:
        limit_s: may be changed at any time.
        count: faults that took or have been taking longer, each once.
        last: of each class, the one that ended last.
    """

    def __init__(self, limit_s: float = LIMIT_DEFAULT_S) -> None:
        self.limit_s = limit_s
        self.count = 0
        self.last: dict[Priority, SlowFault] = {}
        self._reported: set[str] = set()  # at most as many as threads may wait

    def look(self, waiting: Iterable[Waiter], now: float) -> None:
        """Reports threads that have waited longer than the limit at `now` (seconds), each once."""
        slow = {fault_id_of(waiter): waiter for waiter in waiting if now - waiter.since > self.limit_s}
        self._reported &= slow.keys()
        for fault_id, waiter in slow.items():
            if fault_id not in self._reported:
                self._reported.add(fault_id)
                self.count += 1
                _log("waits", fault_id, waiter, now)

    def ended(self, waiter: Waiter, now: float) -> None:
        """A thread goes on at `now` after it had waited longer than the limit."""
        fault_id = fault_id_of(waiter)
        if fault_id in self._reported:
            self._reported.discard(fault_id)
        else:
            self.count += 1
        self.last[waiter.priority] = SlowFault(fault_id, waiter.priority, now - waiter.since)
        _log("waited", fault_id, waiter, now)


def _log(verb: str, fault_id: str, waiter: Waiter, now: float) -> None:
    waited_s, page = now - waiter.since, waiter.pages[0]
    ending = "; see whether the page server answers" if verb == "waits" else "; it goes on"
    logger.warning(
        "fault %s: %s %s %.3f s for page %#x%s",
        fault_id,
        waiter.key,
        verb,
        waited_s,
        page,
        ending,
        extra={"fault_id": fault_id, "page": page, "waited_s": round(waited_s, 6)},
    )
