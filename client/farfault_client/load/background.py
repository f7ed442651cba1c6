"""A background stream beside the faults: all of memory in order, round and round, as a destination pulls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from farfault.v1 import pages_pb2 as pb
from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine import ExtentResult, Fetch, Priority
from farfault_client.engine.rate import RateLimit
from farfault_client.load.faults import Ending
from farfault_client.load.tally import Tally, record
from farfault_client.load.verifier import SeedVerifier
from farfault_client.session.answers import Answer, request_of

REQUEST_BYTES = 256 << 10
REQUESTS_IN_FLIGHT = 8


class BackgroundPull:
    """What a connection's background lane carries; used like a `FaultLoad`. No I/O and no clock.

    Args:
        layout: of the served memory.
        bytes_per_s: cap; 0: none.
        verifier: compares pages with their seed; None: the session's checksum is all there is.

    Attributes:
        tally: its latency is that of whole requests.
    """

    hits = 0

    def __init__(self, layout: Layout, bytes_per_s: int, verifier: SeedVerifier | None) -> None:
        self._layout = layout
        self._limit = RateLimit(bytes_per_s)
        self._verifier = verifier
        self._requests: dict[int, tuple[float, PageRun]] = {}
        self._again: list[PageRun] = []
        self._next_page = 0
        self._next_request_id = 1
        self._now = self._measured_from = self._until = 0.0
        self._is_woken = False
        self.ended_by: Ending | None = None
        self.refusals: Counter[str] = Counter()
        self.tally = Tally()

    def begin(self, now: float, *, measured_from: float, until: float) -> None:
        """Starts; see `FaultLoad.begin`."""
        self._now, self._measured_from, self._until = now, measured_from, until
        self._is_woken = True
        self.ended_by = None
        self.refusals.clear()
        self.tally = Tally(started_at=measured_from, ended_at=measured_from)

    def next_due(self) -> float | None:
        """When the cap allows the next request, or the run is over."""
        if self.ended_by is not None:
            return None
        wait_s = self._limit.wait_s() if len(self._requests) < REQUESTS_IN_FLIGHT else 0.0
        return min(self._until, self._now + wait_s) if wait_s else self._until

    def advance(self, now: float) -> None:
        """Time has passed."""
        self._now = now
        self._is_woken = True
        if now >= self._until:
            self.stop(Ending.TIME)

    def resume(self, now: float) -> None:
        """An answer has come."""
        self.advance(now)

    def stop(self, ending: Ending) -> None:
        """No more requests."""
        self.ended_by = self.ended_by or ending

    @property
    def is_drained(self) -> bool:
        return self.ended_by is not None and not self._requests

    @property
    def measured_until(self) -> float:
        return self._until if self.ended_by is Ending.TIME else max(self._now, self._measured_from)

    def end(self, now: float) -> None:
        """What was not answered by now is an error."""
        self.tally.errors += sum(run.count for _, run in self._requests.values())
        self._requests.clear()
        self._again.clear()

    def take_tally(self, now: float) -> Tally:
        """See `FaultLoad.take_tally`."""
        tally, self.tally = self.tally, Tally(started_at=now, ended_at=now)
        tally.ended_at = max(tally.started_at, now)
        return tally

    def take_wakeups(self) -> Iterable[int]:
        """Connection 0, where there may be something to send."""
        woken, self._is_woken = self._is_woken, False
        return (0,) if woken else ()

    def next_request(self, connection: int) -> pb.FetchRequest | None:
        """The next window of memory, while the credit and the cap allow."""
        if self.ended_by is not None or len(self._requests) >= REQUESTS_IN_FLIGHT or not self._limit.allows(self._now):
            return None
        run = self._again.pop() if self._again else self._next_run()
        request_id = self._next_request_id
        self._next_request_id += 1
        self._requests[request_id] = (self._now, run)
        size_bytes = run.count * self._layout.region_of_page(run.first).page_size_bytes
        self._limit.spend(size_bytes)
        self.tally.offered += 1
        return request_of(Fetch(request_id, Priority.BACKGROUND, (run,), size_bytes), self._layout)

    def _next_run(self) -> PageRun:
        region = self._layout.region_of_page(self._next_page)
        pages = max(1, REQUEST_BYTES // region.page_size_bytes)
        run = PageRun(PageIndex(self._next_page), min(pages, region.end_page - self._next_page))
        self._next_page = run.end if run.end < self._layout.page_count else 0
        return run

    def answered(self, connection: int, answer: Answer, now: float) -> None:
        """A verified answer has come."""
        assert isinstance(answer.data, bytes), "lanes of this process give bytes"
        is_measured = now >= self._measured_from
        offset = answer.data_offset
        for run, result in answer.extents:
            if result is ExtentResult.REFUSED:
                self.refusals.update(set(answer.refusals))
                self.tally.errors += run.count
                continue
            size_bytes = run.count * self._layout.region_of_page(run.first).page_size_bytes
            if self._verifier is not None:
                self._verifier.check(run, answer.data if result is ExtentResult.DATA else None, offset)
            offset += size_bytes if result is ExtentResult.DATA else 0
            if is_measured:
                self.tally.pages += run.count
                self.tally.page_bytes += size_bytes
        for request_id in answer.done:
            request = self._requests.pop(request_id, None)
            if request is not None and is_measured:
                self.tally.faults += 1
                record(self.tally.latency, now - request[0])

    def lane_lost(self, connection: int) -> None:
        """What was in flight is asked for again."""
        for _, run in self._requests.values():
            self.tally.asked_again += run.count
            self._again.append(run)
        self._requests.clear()
