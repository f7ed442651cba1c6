"""A pager that copies from a file on this host: everything that a receiver does, but for the network.

    python -m farfault_client.bench.vcpus.local_pager ATTACH RAM_FILE

The RAM file must not change any more. It serves until it is killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from farfault.v1 import pages_pb2 as pb
from farfault_shim.attach.listener import AttachListener
from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine import Extent, ExtentResult
from farfault_client.receive.pager import Pager
from farfault_client.session.answers import Answer
from farfault_client.session.lane import Lane, LaneUser
from farfault_client.session.lease import Lease, Peer
from farfault_client.session.session import Session, SessionConfig

PAGE_BYTES = 4096
ZERO_PAGE = bytes(PAGE_BYTES)


class FileSession(Session):
    """A session whose demand lane is a file.

    Args:
        ram: the file; one region of 4 KiB pages.
    """

    def __init__(self, ram: Path) -> None:
        super().__init__(SessionConfig(Peer("file")))
        self._file = os.open(ram, os.O_RDONLY | os.O_CLOEXEC)
        self.lease = Lease("", "", 0, Layout([(os.fstat(self._file).st_size, PAGE_BYTES)]))
        self._user: LaneUser | None = None
        self._is_scheduled = False

    def start(self, user: LaneUser, lanes: Iterable[Lane] = (Lane.DEMAND,)) -> None:
        self._user = user

    def pump(self, lane: Lane) -> None:
        """Answers once this turn of the event loop is over, as the lanes send."""
        if lane is Lane.DEMAND and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._answer)

    def _answer(self) -> None:
        self._is_scheduled = False
        assert self._user is not None
        while (request := self._user.next_request(Lane.DEMAND)) is not None:
            self._user.answered(Lane.DEMAND, self._read(request))

    def _read(self, request: pb.FetchRequest) -> Answer:
        extents, data = [], []
        for wanted in request.ranges:
            for page in range(wanted.first_page, wanted.first_page + wanted.page_count):
                content = os.pread(self._file, PAGE_BYTES, page * PAGE_BYTES)
                result = ExtentResult.ZERO if content == ZERO_PAGE else ExtentResult.DATA
                extents.append(Extent(PageRun(PageIndex(page), 1), result))
                if result is ExtentResult.DATA:
                    data.append(content)
        return Answer(extents, b"".join(data), 0, (request.request_id,), (), 0, 0)


async def serve(attach: Path, ram: Path) -> None:
    """Serves one VMM until it is killed."""
    session = FileSession(ram)
    pager = Pager(session)
    session.start(pager)
    await AttachListener.start(attach, pager.attach, lambda _: pager.detach())
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]), Path(sys.argv[2])))
