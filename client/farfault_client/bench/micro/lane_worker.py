"""A process that fetches pages over a lane, with nothing of a VM: `LaneUser` in its barest form.

    python -m farfault_client.bench.micro.lane_worker fetch TARGET grpc|express COUNT BACKGROUND
    python -m farfault_client.bench.micro.lane_worker bulk TARGET INSTALL

It prints one JSON object.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Final

from farfault.v1 import pages_pb2 as pb
from farfault_cli.errors import FarfaultError
from farfault_shim.attach.wire import FaultSource, HandOver, HandOverRegion
from farfault_shim.layout import PageIndex, PageRun
from farfault_shim.uffd.userfaultfd import Userfaultfd

from farfault_client.bench.micro.settle import SETTLE_S
from farfault_client.bulk.messages import Target
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.engine import Fetch, PageState, Priority
from farfault_client.engine.states import encode
from farfault_client.receive.lone_faults import LoneFaults
from farfault_client.session.answers import Answer, LonePage, Placed, request_of
from farfault_client.session.connect import session_config
from farfault_client.session.lane import Lane
from farfault_client.session.session import Session

BATCH_PAGES: Final = 256
"""As large as the receiver asks for on a fast way."""
WINDOW_REQUESTS: Final = 4
"""Background requests that are not answered yet: 4 MiB."""
STRIDE_PAGES: Final = 7919
TIMEOUT_S: Final = 120.0
FIRST_BACKGROUND_ID: Final = 1 << 32
WARM_UP_SHARE: Final = 0.05


class Background:
    """Asks for all of memory in order, `WINDOW_REQUESTS` batches at a time; over and over if it is endless."""

    def __init__(self, session: Session, *, endless: bool) -> None:
        assert session.lease is not None
        self._session = session
        self._layout = session.lease.layout
        self._endless = endless
        self._next_page = 0
        self._next_id = FIRST_BACKGROUND_ID
        self._in_flight: dict[int, int] = {}
        self.received_bytes = 0

    @property
    def finished(self) -> bool:
        return not self._in_flight and self._next_page >= self._layout.page_count

    def next_request(self) -> pb.FetchRequest | None:
        if self._endless and self._next_page >= self._layout.page_count:
            self._next_page = 0
        if len(self._in_flight) >= WINDOW_REQUESTS or self._next_page >= self._layout.page_count:
            return None
        count = min(BATCH_PAGES, self._layout.page_count - self._next_page)
        run = PageRun(PageIndex(self._next_page), count)
        fetch = Fetch(self._next_id, Priority.BACKGROUND, (run,), count * 4096)
        self._in_flight[fetch.request_id] = count
        self._next_page += count
        self._next_id += 1
        return request_of(fetch, self._layout)

    def placed(self, placed: Placed) -> None:
        """Memory has neither zero pages nor holes: every page either was placed, or left out as nobody wants it."""
        for done in placed.done:
            self._in_flight.pop(done)
        pages = placed.clipped_pages + sum(placement.run.count for placement in placed.placements)
        self.received_bytes += pages * mmap.PAGESIZE
        self._session.pump(Lane.BACKGROUND)


class FetchUser:
    """Fetches single pages, one at a time; the background flows meanwhile if there is one."""

    def __init__(self, session: Session, count: int, background: Background | None) -> None:
        assert session.lease is not None
        self._session = session
        self._layout = session.lease.layout
        self._count = count
        self._background = background
        self._lone = LoneFaults.of(self._layout)
        self._asked_at = 0.0
        self._is_waiting = True
        self.took_s: list[float] = []
        self.finished = asyncio.Event()

    def begin(self) -> None:
        """Fetches from now on."""
        self._is_waiting = False
        self._session.pump(Lane.DEMAND)

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        if lane is Lane.BACKGROUND:
            return self._background.next_request() if self._background else None
        if self._is_waiting or self.finished.is_set():
            return None
        return request_of(self._next(), self._layout)

    def answered(self, lane: Lane, answer: Answer) -> None:
        self._came()

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        came = self._lone.came(data, position) if self._lone is not None else None
        if came is not None:
            self._came()
        return came

    def _next(self) -> Fetch:
        self._is_waiting = True
        number = len(self.took_s)
        run = PageRun(PageIndex(number * STRIDE_PAGES % self._layout.page_count), 1)
        self._asked_at = perf_counter()
        return Fetch(number + 1, Priority.VCPU, (run,), 4096)

    def _came(self) -> None:
        """The next page is asked for as a pager asks for the page of a fault."""
        self.took_s.append(perf_counter() - self._asked_at)
        self._is_waiting = False
        if len(self.took_s) >= self._count:
            self.finished.set()
        elif self._session.takes_pages and self._lone is not None:
            fetch = self._next()
            assert self._session.lease is not None
            generation = self._session.lease.generation
            frame = self._lone.request(fetch.runs[0].first, fetch.request_id, fetch.priority, generation)
            assert frame is not None
            self._session.send_pages(frame, (fetch.request_id,))
        else:
            self._session.pump(Lane.DEMAND)

    def placed(self, lane: Lane, placed: Placed) -> None:
        assert self._background is not None
        self._background.placed(placed)

    def lane_lost(self, lane: Lane) -> None:
        if not self.finished.is_set():
            raise FarfaultError(f"the {lane.value} lane was lost")


class BulkUser:
    """Takes all of memory over the background lane."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self.began_at = 0.0
        self.took_s = 0.0
        self.finished = asyncio.Event()

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        if lane is Lane.DEMAND:
            return None
        if not self.began_at:
            self.began_at = perf_counter()
        return self._background.next_request()

    def answered(self, lane: Lane, answer: Answer) -> None:
        raise FarfaultError("the background did not come through a process of its own")

    def page_came(self, data: bytes, position: int) -> LonePage | None:
        return None  # the demand lane is not used

    def placed(self, lane: Lane, placed: Placed) -> None:
        self._background.placed(placed)
        if self._background.finished and not self.finished.is_set():
            self.took_s = perf_counter() - self.began_at
            self.finished.set()

    def lane_lost(self, lane: Lane) -> None:
        if not self.finished.is_set():
            raise FarfaultError(f"the {lane.value} lane was lost")


class Memory:
    """Memory of our own under a userfaultfd, where pages are installed that nobody waits for."""

    def __init__(self, size_bytes: int) -> None:
        self._memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_SHARED)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.uffd = Userfaultfd.create()
        self.uffd.register(address, size_bytes)
        region = HandOverRegion(address, 0, size_bytes, 0, mmap.PAGESIZE)
        self.handover = HandOver((region,), FaultSource.BLOCKING, ("uffd",))


async def fetch(target: str, *, express: bool, count: int, with_background: bool) -> dict[str, float]:
    """Percentiles of one fetch."""
    session = Session(session_config(target, express=express, kind=pb.LEASE_KIND_CLONE))
    await session.open()
    background = Background(session, endless=True) if with_background else None
    user = FetchUser(session, count, background)
    _share_pages(session, lambda: len(user.took_s))
    session.start(user)
    if not await session.wait_ready(TIMEOUT_S):
        raise FarfaultError(f"page server {target} cannot be reached on both lanes")
    await asyncio.sleep(SETTLE_S)
    began_at, bytes_before = perf_counter(), background.received_bytes if background else 0
    user.begin()
    async with asyncio.timeout(TIMEOUT_S):
        await user.finished.wait()
    carrier = session.stats.lanes[Lane.DEMAND].carrier
    if carrier != ("express" if express else "grpc"):
        raise FarfaultError(f"the demand lane went over {carrier}")
    elapsed_s = perf_counter() - began_at
    await session.close()
    took_s = sorted(user.took_s[int(count * WARM_UP_SHARE) :])
    figures = {"p50_us": took_s[len(took_s) // 2] * 1e6, "p99_us": took_s[len(took_s) * 99 // 100] * 1e6}
    if background is not None:
        figures["background_mb_per_s"] = (background.received_bytes - bytes_before) / 1e6 / elapsed_s
    return figures


async def bulk(target: str, *, with_install: bool) -> dict[str, float]:
    """Rate of the background lane."""
    session = Session(session_config(target, kind=pb.LEASE_KIND_CLONE))
    lease = await session.open()
    user = BulkUser(Background(session, endless=False))
    _share_pages(session)
    memory = Memory(lease.layout.size_bytes) if with_install else None
    if memory is not None:
        session.place_into(Target(memory.handover, with_digest=False), [memory.uffd.fileno()])
    session.start(user)
    async with asyncio.timeout(TIMEOUT_S):
        await user.finished.wait()
    await session.close()
    return {"mb_per_s": lease.layout.size_bytes / 1e6 / user.took_s}


def _share_pages(session: Session, faults: Callable[[], int] = lambda: 0) -> None:
    """Every page may be placed. A single fetch counts as a fault, so that bulk makes room for it as in a receiver."""
    assert session.lease is not None
    page_count = session.lease.layout.page_count
    shared = SharedPages(page_count)
    shared.states[:page_count] = bytes([encode(PageState.IN_FLIGHT, Priority.BACKGROUND)]) * page_count
    session.share_pages(shared, faults)


def main() -> None:
    """Entry point of the child process."""
    import uvloop

    match sys.argv[1:]:
        case ["fetch", target, lane, count, background]:
            work = fetch(target, express=lane == "express", count=int(count), with_background=background == "1")
        case ["bulk", target, install]:
            work = bulk(target, with_install=install == "1")
        case _:
            sys.exit(2)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(work)))


if __name__ == "__main__":
    main()
