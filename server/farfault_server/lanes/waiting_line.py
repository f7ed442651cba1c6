"""The requests of one stream that wait for their answer, most urgent first. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from farfault.v1 import pages_pb2 as pb

from farfault_server.lanes.limits import RANGES_WAITING_MAX, LaneLimits

PageRange: TypeAlias = tuple[int, int, int]
"""``(region, first_page, page_count)``, as a client wrote it."""

LOWEST: Final = int(pb.PRIORITY_BACKGROUND)
DATA: Final = int(pb.EXTENT_KIND_DATA)
OUT_OF_RANGE: Final = int(pb.EXTENT_KIND_OUT_OF_RANGE)
REJECTED: Final = int(pb.EXTENT_KIND_REJECTED)


class Piece(NamedTuple):
    """A part of a range, to be answered next.

    Attributes:
        kind: DATA: read it; otherwise the status that it gets.
        done_request_id: with this piece that request is answered in full; None: not yet.
        arrived_us: when the request came.
    """

    region: int
    first_page: int
    page_count: int
    kind: int
    done_request_id: int | None
    arrived_us: int


class _Request:
    __slots__ = ("arrived_us", "is_counted", "next_range", "ranges", "request_id")

    def __init__(
        self, request_id: int, ranges: list[tuple[int, int, int, int]], arrived_us: int, is_counted: bool
    ) -> None:
        self.request_id = request_id
        self.ranges = ranges
        self.next_range = 0
        self.arrived_us = arrived_us
        self.is_counted = is_counted


class WaitingLine:
    """Requests in, pieces out: by priority, then in the order of arrival.

    Args:
        regions: ``(page_count, page_size_bytes)`` of each region.
        limits: requests and pages over them are answered REJECTED.
    """

    def __init__(self, regions: Sequence[tuple[int, int]], limits: LaneLimits) -> None:
        self._regions = regions
        self._limits = limits
        self._by_priority: tuple[deque[_Request], ...] = tuple(deque() for _ in range(LOWEST + 1))
        self._ranges_waiting = 0
        self.requests_waiting = 0

    def __bool__(self) -> bool:
        return self._ranges_waiting > 0

    @property
    def is_full(self) -> bool:
        """Do not push before some pieces are taken: read no more from the client."""
        return self._ranges_waiting >= RANGES_WAITING_MAX

    def clear(self) -> None:
        """Forgets everything that waits: nobody will read the answers."""
        for requests in self._by_priority:
            requests.clear()
        self._ranges_waiting = self.requests_waiting = 0

    def push(self, request_id: int, priority: int, ranges: Iterable[PageRange], now_us: int) -> None:
        """A request has come. Any values are fine; what cannot be served gets its status in the answer."""
        is_counted = self.requests_waiting < self._limits.max_requests_in_flight
        pages_left = self._limits.max_request_pages if is_counted else 0
        checked = []
        for region, first_page, page_count in ranges:
            kind = DATA
            if region >= len(self._regions) or not 0 < page_count <= self._regions[region][0] - first_page:
                kind = OUT_OF_RANGE
            elif page_count > pages_left:
                kind = REJECTED
            else:
                pages_left -= page_count
            checked.append((region, first_page, page_count, kind))
        if not checked:
            checked.append((0, 0, 0, OUT_OF_RANGE))  # nothing asked: still answered
        self._ranges_waiting += len(checked)
        self.requests_waiting += is_counted
        level = priority if 0 < priority < LOWEST else LOWEST
        self._by_priority[level].append(_Request(request_id, checked, now_us, is_counted))

    def take(self, budget_bytes: int) -> Piece | None:
        """The next piece.

        Args:
            budget_bytes: of page data; a DATA piece is cut to it.

        Returns:
            None when nothing waits, or when not even one page of the next range fits the budget.
        """
        for requests in self._by_priority:
            if requests:
                return self._take_from(requests, budget_bytes)
        return None

    def _take_from(self, requests: deque[_Request], budget_bytes: int) -> Piece | None:
        request = requests[0]
        region, first_page, page_count, kind = request.ranges[request.next_range]
        if kind == DATA:
            fitting = budget_bytes // self._regions[region][1]
            if fitting < page_count:
                if fitting == 0:
                    return None
                request.ranges[request.next_range] = (region, first_page + fitting, page_count - fitting, kind)
                return Piece(region, first_page, fitting, kind, None, request.arrived_us)
        request.next_range += 1
        self._ranges_waiting -= 1
        if request.next_range < len(request.ranges):
            return Piece(region, first_page, page_count, kind, None, request.arrived_us)
        requests.popleft()
        self.requests_waiting -= request.is_counted
        return Piece(region, first_page, page_count, kind, request.request_id, request.arrived_us)
