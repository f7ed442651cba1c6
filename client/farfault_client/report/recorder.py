"""What is written down about a move: one JSON object a line, few enough lines for any length of move.

`record_format` says what they are. Samples are 50 ms apart at first; after each `SAMPLES_PER_INTERVAL` of them the
interval doubles, so that an hour takes about 8,000 lines.
"""

from __future__ import annotations

import time
from array import array
from typing import Any, Final

from farfault.v1 import receiver_pb2 as rpb

from farfault_client.metrics.memory_cells import settled_shares
from farfault_client.receive.pager import Pager
from farfault_client.receive.receiver import Receiver
from farfault_client.receive.summary import summary_of
from farfault_client.report.record_format import VERSION

INTERVAL_FIRST_S: Final = 0.05
SAMPLES_PER_INTERVAL: Final = 1200
EVENTS_MAX: Final = 5000
MAP_CELLS: Final = 128
MAP_EVERY_SAMPLES: Final = 4

Line = dict[str, Any]


class Recorder:
    """Makes the lines of one receiver's record; writing them is the caller's. `now`: seconds, monotonic."""

    def __init__(self, receiver: Receiver, now: float) -> None:
        assert receiver.pager is not None, "start the receiver first"
        self._receiver = receiver
        self._pager: Pager = receiver.pager
        self._began_at = now
        self._samples = 0
        self._events = 0
        self._buckets = array("Q", bytes(8 * len(self._pager.stats.times.total.counts())))
        self._blocked_s: dict[str, float] = {}
        self._phase = receiver.progress.phase
        self._connected = receiver.session.connected

    @property
    def interval_s(self) -> float:
        """Until the next sample."""
        return INTERVAL_FIRST_S * float(2 ** (self._samples // SAMPLES_PER_INTERVAL))

    def header(self) -> Line:
        layout = self._pager.layout
        return {
            "type": "header",
            "version": VERSION,
            "unix_s": round(time.time(), 3),
            "source": self._receiver.config.session.peer.target,
            "guest_pages": layout.page_count,
            "page_size_bytes": layout.regions[0].page_size_bytes,
            "slow_fault_s": self._pager.slow_faults.limit_s,
        }

    def sample(self, now: float) -> Line:
        """Everything that changes, as of `now`."""
        pager, engine = self._pager, self._pager.engine
        lanes = self._receiver.session.stats.lanes
        line: Line = {
            "type": "sample",
            "t": self._t(now),
            "settled": engine.settled_pages,
            "faults": engine.stats.demand_faults,
            "waiting": len(engine.waiting),
            "longest_wait_s": round(max((now - waiter.since for waiter in engine.waiting), default=0.0), 6),
            "bytes": {lane.value: stats.wire_bytes for lane, stats in lanes.items()},
            "blocked_s": self._blocked(),
            "latency": self._new_latencies(),
        }
        if self._samples % MAP_EVERY_SAMPLES == 0:
            line["map"] = settled_map(pager, MAP_CELLS)
        self._samples += 1
        return line

    def changes(self, now: float) -> list[Line]:
        """Events for what the receiver has become since the last call."""
        found: list[Line] = []
        phase, connected = self._receiver.progress.phase, self._receiver.session.connected
        if phase != self._phase:
            self._phase = phase
            level = "error" if phase == rpb.PHASE_FAILED else "info"
            problem = self._receiver.progress.error
            name = rpb.Phase.Name(phase).removeprefix("PHASE_").lower()
            found += self.event(now, level, f"phase: {name}" + (f"; {problem}" if problem else ""))
        if connected != self._connected:
            self._connected = connected
            level, text = ("info", "page server connected") if connected else ("warning", "page server out of reach")
            found += self.event(now, level, text)
        return found

    def event(self, now: float, level: str, text: str) -> list[Line]:
        """A line for the event log; none after `EVENTS_MAX` of them, and the last one says so."""
        self._events += 1
        if self._events > EVENTS_MAX:
            return []
        if self._events == EVENTS_MAX:
            level, text = "warning", "further events are not recorded"
        return [{"type": "event", "t": self._t(now), "level": level, "text": text}]

    def footer(self, now: float) -> Line:
        summary = {
            **summary_of(self._receiver.status()),
            "blocked_s_by_vcpu": self._blocked(),
            "slow_faults": self._pager.slow_faults.count,
        }
        return {"type": "footer", "t": self._t(now), "summary": summary}

    def _t(self, now: float) -> float:
        return round(now - self._began_at, 4)

    def _blocked(self) -> dict[str, float]:
        """By vCPU, as the shim counts; what it said last once the VMM has detached."""
        found = self._receiver.vcpu_counters()
        if found:
            self._blocked_s = {str(vcpu): round(counters.blocked_ns * 1e-9, 6) for vcpu, counters in found.items()}
        return self._blocked_s

    def _new_latencies(self) -> dict[str, int]:
        before, after = self._buckets, self._pager.stats.times.total.counts()
        self._buckets = after
        return {str(index): new - old for index, (new, old) in enumerate(zip(after, before, strict=True)) if new != old}


def settled_map(pager: Pager, cells: int) -> str:
    """A digit for each of at most `cells` equal parts of guest memory: its share of settled pages in ninths, rounded
    down, so that a 9 is complete (as far as `settled_shares` tells)."""
    return "".join(str(9 * settled // count) for settled, count in settled_shares(pager.engine.pages, cells))
