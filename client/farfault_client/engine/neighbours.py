"""Neighbour prefetch: pages that a fault foretells, as far as earlier guesses were right.

A *stream* begins where three faults of one vCPU are equally far apart: it may run up, down, or in strides.
Prefetched pages do not fault, so a guess is proven at its *edge*: a fault on the first page behind it says
that the guest went through it. Each proof doubles the depth; a stream whose edge is not reached in time has
wasted its pages. Guesses are made while most pages were of use, or else within a budget of a few per cent
of the faults, which is what a guest that touches pages at random pays.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

from farfault_shim.layout import PageIndex, PageRun

DEPTH_MAX_PAGES: Final = 64
DEPTH_FIRST_PAGES: Final = 2
STRIDE_MAX_PAGES: Final = 64
STREAMS_MAX: Final = 64
"""Streams that are followed; the one that was proven longest ago is given up first."""
STREAM_AGE_FAULTS: Final = 256
"""A stream that is not proven within this many faults is given up."""
HISTORY_FAULTS: Final = 8
"""Faults of one vCPU that are searched for a stream."""
HISTORIES_MAX: Final = 1024
BUDGET_FREE_PAGES: Final = 8
BUDGET_SHARE: Final = 0.03
"""Pages that may be wasted: the free ones, and this share of the faults."""
SCORE_MEMORY_PAGES: Final = 8192
"""The score of useful and wasted pages is halved when it comes to this, so that it follows the guest."""


@dataclass(slots=True)
class _Stream:
    """A guess that goes on: pages `stride` apart; `edge` is the next that was not asked for."""

    stride: int
    edge: int
    depth: int
    proven_at: int
    proven: bool = False


class NeighbourPrefetch:
    """Decides which neighbours of a fault to fetch.

    Args:
        depth_max_pages: longest prefetch; 0 turns it off.

    Attributes:
        useful_pages, wasted_pages: the measured score of past guesses, fading.
    """

    def __init__(self, depth_max_pages: int = DEPTH_MAX_PAGES) -> None:
        self.depth_max_pages = depth_max_pages
        self.hits = 0
        self.misses = 0
        self.useful_pages = 0
        self.wasted_pages = 0
        self._faults = 0
        self._scored_faults = 0
        self._unproven_pages = 0
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._histories: OrderedDict[object, deque[int]] = OrderedDict()

    @property
    def hit_rate(self) -> float:
        """Share of prefetched pages that were of use, 0..1; 1 before anything was tried."""
        scored = self.useful_pages + self.wasted_pages
        return self.useful_pages / scored if scored else 1.0

    def fault(self, key: object, page: int, page_count: int) -> list[PageRun]:
        """A vCPU faulted on a page: the neighbours to fetch as well.

        Args:
            key: the vCPU.
            page: within its region.
            page_count: of the region; no neighbour lies outside.

        Returns:
            Runs in the order of need; pages of them that are present or in flight are the caller's to skip.
        """
        if self.depth_max_pages == 0:
            return []
        self._faults += 1
        self._scored_faults += 1
        if self._streams:
            self._give_up_old()
            stream = self._streams.pop(page, None) or self._near(page)
            if stream is not None:
                self._prove(stream)
                return self._guess(page, stream, page_count)
        stride = self._stride(key, page)
        if stride and self._may_try():
            return self._guess(page, _Stream(stride, page, 0, self._faults), page_count)
        return []

    def goes_on_at(self, page: int, guess: list[PageRun]) -> int | None:
        """Where a guest is expected that faulted on `page` and got this guess of `fault`.

        Returns:
            None unless the guess is as long as they get, and upwards: the guest goes through its memory in order.
        """
        if len(guess) == 1 and guess[0].count == self.depth_max_pages > 1 and guess[0].first > page:
            return guess[0].end
        return None

    def _guess(self, page: int, stream: _Stream, page_count: int) -> list[PageRun]:
        """Asks for the pages from the stream's edge on, and moves the edge behind them."""
        stride = stream.stride
        depth_max = max(DEPTH_FIRST_PAGES, int(self.depth_max_pages * self.hit_rate))
        stream.depth = min(max(DEPTH_FIRST_PAGES, stream.depth * 2), depth_max, self.depth_max_pages)
        ahead = (stream.edge - page) // stride
        first = stream.edge if ahead > 0 else page + stride
        last = first + (stream.depth - 1) * stride
        if not 0 <= first < page_count:
            return []
        last = (
            min(last, page_count - 1 - (page_count - 1 - first) % stride) if stride > 0 else max(last, first % -stride)
        )
        count = (last - first) // stride + 1
        stream.depth = count
        stream.edge = last + stride
        if not stream.proven:
            self._unproven_pages += count
        self._follow(stream)
        if stride == 1:
            return [PageRun(PageIndex(first), count)]
        if stride == -1:
            return [PageRun(PageIndex(last), count)]
        return [PageRun(PageIndex(found), 1) for found in range(first, last + stride, stride)]

    def _follow(self, stream: _Stream) -> None:
        other = self._streams.pop(stream.edge, None)
        if other is not None:
            self._miss(other)
        self._streams[stream.edge] = stream
        if len(self._streams) > STREAMS_MAX:
            self._miss(self._streams.popitem(last=False)[1])

    def _near(self, page: int) -> _Stream | None:
        """A proven stream whose last guess or the same length behind it holds the page: the guest was ahead of us,
        or found pages that the background had brought."""
        for edge, stream in self._streams.items():
            steps, rest = divmod(page - edge, stream.stride)
            if stream.proven and rest == 0 and -stream.depth <= steps <= stream.depth:
                del self._streams[edge]
                return stream
        return None

    def _prove(self, stream: _Stream) -> None:
        self.hits += 1
        self.useful_pages += stream.depth
        if not stream.proven:
            self._unproven_pages -= stream.depth
        stream.proven = True
        stream.proven_at = self._faults
        self._fade()

    def _miss(self, stream: _Stream) -> None:
        self.misses += 1
        self.wasted_pages += stream.depth
        if not stream.proven:
            self._unproven_pages -= stream.depth
        self._fade()

    def _fade(self) -> None:
        if self.useful_pages + self.wasted_pages >= SCORE_MEMORY_PAGES:
            self.useful_pages //= 2
            self.wasted_pages //= 2
            self._scored_faults //= 2

    def _give_up_old(self) -> None:
        while self._streams:
            edge, stream = next(iter(self._streams.items()))
            if self._faults - stream.proven_at <= STREAM_AGE_FAULTS:
                return
            del self._streams[edge]
            self._miss(stream)

    def _may_try(self) -> bool:
        at_stake = self.wasted_pages + self._unproven_pages
        if self.useful_pages > 2 * at_stake:
            return True
        return at_stake + DEPTH_FIRST_PAGES <= BUDGET_FREE_PAGES + BUDGET_SHARE * self._scored_faults

    def _stride(self, key: object, page: int) -> int:
        """The distance of three faults of the vCPU that are equally far apart, this one the last; 0: there are none."""
        history = self._histories.get(key)
        if history is None:
            history = self._histories[key] = deque(maxlen=HISTORY_FAULTS)
            if len(self._histories) > HISTORIES_MAX:
                self._histories.popitem(last=False)
        found = 0
        for before in history:
            distance = page - before
            if distance and -STRIDE_MAX_PAGES <= distance <= STRIDE_MAX_PAGES and before - distance in history:
                found = distance  # the latest fault is looked at last and wins
        history.append(page)
        return found
