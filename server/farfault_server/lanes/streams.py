"""The open streams: how many a lease has, and how to end them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from farfault_server.lanes.waiting_line import WaitingLine
from farfault_server.leases.refusals import Code, RefusedError

STREAMS_PER_LEASE_MAX: Final = 32
"""Demand, background and express streams of one lease together, in one process of the server."""


class Streams:
    """All open streams of this process."""

    def __init__(self) -> None:
        self._by_lease: dict[str, set[Callable[[], None]]] = {}
        self._demand: set[WaitingLine] = set()

    @contextmanager
    def opened(self, lease_id: str, end: Callable[[], None], *, demand: WaitingLine | None = None) -> Iterator[None]:
        """A stream lives as long as the context.

        Args:
            lease_id: whose stream it is.
            end: ends the stream soon; called at most once, on the event loop.
            demand: its requests, where they go before those of other lanes.

        Raises:
            RefusedError: RESOURCE_EXHAUSTED, the lease has too many.
        """
        self.add(lease_id, end, demand)
        try:
            yield
        finally:
            self.remove(lease_id, end, demand)

    def add(self, lease_id: str, end: Callable[[], None], demand: WaitingLine | None = None) -> None:
        """As `opened`, to be undone with `remove`."""
        ends = self._by_lease.setdefault(lease_id, set())
        if len(ends) >= STREAMS_PER_LEASE_MAX:
            raise RefusedError(
                Code.RESOURCE_EXHAUSTED,
                f"the lease has {STREAMS_PER_LEASE_MAX} streams already",
                "close some; a few streams carry all that a host can send",
            )
        ends.add(end)
        if demand is not None:
            self._demand.add(demand)

    def remove(self, lease_id: str, end: Callable[[], None], demand: WaitingLine | None = None) -> None:
        """The stream is closed."""
        ends = self._by_lease.get(lease_id, set())
        ends.discard(end)
        if not ends:
            self._by_lease.pop(lease_id, None)
        if demand is not None:
            self._demand.discard(demand)

    def count(self, lease_id: str) -> int:
        """Open streams of a lease."""
        return len(self._by_lease.get(lease_id, ()))

    @property
    def lease_ids(self) -> list[str]:
        """Leases that have streams."""
        return list(self._by_lease)

    @property
    def demand_waits(self) -> bool:
        """Some urgent request is not answered yet."""
        return any(self._demand)

    def end_lease(self, lease_id: str) -> None:
        """Ends all streams of a lease."""
        for end in list(self._by_lease.get(lease_id, ())):
            end()

    def end_all(self) -> None:
        """Ends every stream."""
        for lease_id in self.lease_ids:
            self.end_lease(lease_id)
