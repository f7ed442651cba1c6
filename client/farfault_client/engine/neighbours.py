"""Neighbour prefetch: pages next to a fault, fetched as far as earlier guesses were right.

Every guess is remembered (bounded) until the guest touches it or it is forgotten. With mappings made at
install time a prefetched page never faults, so a hit shows only at the edge: a fault on the page right
behind a prefetched run, in the same direction, says that the run was used. The first fault of a stream
fetches nothing, the second (its direct neighbour) one page, and each further hit twice as many. A guest
that touches pages at random therefore pays only for neighbours that meet by chance.
"""

from __future__ import annotations

from collections import OrderedDict

from farfault_shim.layout import PageIndex, PageRun

DEPTH_MAX_PAGES = 64
STREAMS_MAX = 64
"""Edges that are remembered; the oldest is forgotten first and counts as a miss."""


class NeighbourPrefetch:
    """Decides which neighbours of a fault to fetch.

    Args:
        depth_max_pages: longest prefetch; 0 turns it off.
    """

    def __init__(self, depth_max_pages: int = DEPTH_MAX_PAGES) -> None:
        self.depth_max_pages = depth_max_pages
        self.hits = 0
        self.misses = 0
        # page that the guest would fault on next if it goes on as guessed -> (stride, depth used)
        self._edges: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def fault(self, page: int, page_count: int) -> PageRun | None:
        """A vCPU faulted on `page`: the run of neighbours to fetch as well, or None.

        The run never leaves ``[0, page_count)``; pages of it that are present or in flight are the caller's to skip.
        """
        if self.depth_max_pages == 0:
            return None
        edge = self._edges.pop(page, None)
        if edge is not None:
            self.hits += 1
            stride, depth = edge
            return self._guess(page, stride, min(max(1, depth * 2), self.depth_max_pages), page_count)
        # A first fault in this place: remember both directions, fetch nothing yet.
        self._remember(page + 1, 1, 0)
        self._remember(page - 1, -1, 0)
        return None

    def _guess(self, page: int, stride: int, depth: int, page_count: int) -> PageRun | None:
        if stride > 0:
            first, end = page + 1, min(page + 1 + depth, page_count)
            edge = end
        else:
            first, end = max(0, page - depth), page
            edge = first - 1
        if end <= first:
            return None
        self._remember(edge, stride, depth)
        return PageRun(PageIndex(first), end - first)

    def _remember(self, edge: int, stride: int, depth: int) -> None:
        self._edges[edge] = (stride, depth)
        self._edges.move_to_end(edge)
        if len(self._edges) > STREAMS_MAX:
            _, (_, forgotten_depth) = self._edges.popitem(last=False)
            if forgotten_depth:
                self.misses += 1
