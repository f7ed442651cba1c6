"""Holds the record at run time: changes one after the other, each durable and known to all lanes before it counts."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from farfault_server.leases.book import Lease, LeaseBook
from farfault_server.leases.refusals import Code, RefusedError
from farfault_server.leases.store import Store
from farfault_server.memory import ServedMemory

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LeaseKeeper:
    """The record, and who was seen when.

    Args:
        book: the record at the start; it is saved by `change` or `save_now` only.
        store: where it is kept.
        memory: follows the record: readable while the VM is stopped, and of its generation.
    """

    def __init__(self, book: LeaseBook, store: Store, memory: ServedMemory) -> None:
        self.book = book
        self.memory = memory
        self.publish: Callable[[], Coroutine[Any, Any, None]] = _nobody
        """Tells every other process of the server of a change; returns when they know."""
        self.lease_ended: Callable[[str], None] = _ignore
        """Called with the id of a lease that is no longer there."""
        self._store = store
        self._lock = asyncio.Lock()
        self._seen_s: dict[str, float] = {}
        self._telling: set[asyncio.Task[None]] = set()
        memory.readable = book.is_stopped
        memory.generation = book.generation

    def save_now(self) -> None:
        """Saves the record as it is; for the start of the server.

        Raises:
            OSError: see `Store.save`.
        """
        self._store.save(self.book)

    def authorize(self, lease_id: str | None, token: str | None) -> Lease:
        """As `LeaseBook.authorize`; the client counts as seen."""
        lease = self.book.authorize(lease_id, token)
        self.saw(lease.lease_id)
        return lease

    def saw(self, lease_id: str) -> None:
        """The client of a lease is there."""
        self._seen_s[lease_id] = time.monotonic()

    def idle_s(self, lease_id: str) -> float:
        """Since when a client was not seen; one from before a restart counts as seen at the start."""
        now = time.monotonic()
        return now - self._seen_s.setdefault(lease_id, now)

    async def change(self, decide: Callable[[LeaseBook], tuple[LeaseBook, T]]) -> T:
        """Makes the next record, saves it, and tells everyone; then returns what `decide` returned beside it.

        Raises:
            RefusedError: `decide` refused, or the record could not be saved (INTERNAL); nothing has changed.
        """
        # A caller that is cancelled leaves a change that goes on: what is on disk and what is here stay the same.
        return await asyncio.shield(asyncio.ensure_future(self._change(decide)))

    async def _change(self, decide: Callable[[LeaseBook], tuple[LeaseBook, T]]) -> T:
        async with self._lock:
            book, result = decide(self.book)
            if book is self.book:
                return result
            try:
                await asyncio.to_thread(self._store.save, book)
            except OSError as error:
                logger.error("cannot save the lease record: %s", error)
                raise RefusedError(
                    Code.INTERNAL,
                    f"the page server cannot save its lease record: {error.strerror}",
                    "make room in, or repair, the file system of its --state directory",
                ) from error
            takes_away = self._takes_away(book)
            self.adopt(book, readable=book.is_stopped)
            telling = self._tell()
            if takes_away:
                await telling
            return result

    def _takes_away(self, book: LeaseBook) -> bool:
        """Whether something that was allowed no longer is: then nobody may go on under the old record."""
        return (
            bool(self.book.leases.keys() - book.leases.keys())
            or book.generation != self.book.generation
            or (self.memory.readable and not book.is_stopped)
        )

    def _tell(self) -> asyncio.Task[None]:
        """Other processes learn of the record in the order of its changes; nobody has to wait for more rights."""
        telling: asyncio.Task[None] = asyncio.ensure_future(self.publish())
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)
        return telling

    def adopt(self, book: LeaseBook, *, readable: bool) -> None:
        """Takes a record that is durable already; `change` does so, and so does another process of the server."""
        ended = self.book.leases.keys() - book.leases.keys()
        self.book = book
        self.memory.readable = readable
        self.memory.generation = book.generation
        for lease_id in ended:
            self._seen_s.pop(lease_id, None)
            self.lease_ended(lease_id)

    def mark_stopped(self) -> None:
        """The VM that is being suspended has stopped: its memory may be read from now on."""
        self.memory.readable = True
        self._tell()


async def _nobody() -> None:
    """There is no other process."""


def _ignore(lease_id: str) -> None:
    """Nobody wants to know."""
