"""Turns waiting requests into batches: reads pages, leaves zero pages out, adds the checksum.

The core of every lane. The driver calls `Answering.receive` for each message that comes, and `Answering.next_batch`
(or `next_pieces`) until it returns None. A lone request is answered by the first call; requests that came meanwhile
share a batch. Most faults are lone requests for one page: `Answering.lone_answer` answers those at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from farfault.checksum import batch_checksum
from farfault.codec import Extent, encode_pieces
from farfault.v1 import pages_pb2 as pb

from farfault_server.lanes.limits import DONE_PER_BATCH_MAX, EXTENTS_PER_BATCH_MAX, READS_PER_BATCH_MAX, LaneLimits
from farfault_server.lanes.lone_answers import LENGTH_BYTES, LoneAnswer, LoneAnswers
from farfault_server.lanes.stats import LaneStats
from farfault_server.lanes.waiting_line import DATA, Piece, WaitingLine
from farfault_server.memory import PageRegion, ServedMemory
from farfault_server.memory.zeros import runs, zero_block

ZERO: Final = int(pb.EXTENT_KIND_ZERO)
NOT_FROZEN: Final = int(pb.EXTENT_KIND_NOT_FROZEN)
IO_ERROR: Final = int(pb.EXTENT_KIND_IO_ERROR)
_LAST_OF_FAULTS: Final = int(pb.PRIORITY_VMM)


class _Batch:
    """A batch that is being filled."""

    __slots__ = ("data", "data_bytes", "done", "extents", "pages_data", "pages_zero", "ranges_refused", "read_bytes")

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self.data: list[bytes] = []
        self.data_bytes = 0
        self.read_bytes = 0
        self.done: list[int] = []
        self.pages_data = 0
        self.pages_zero = 0
        self.ranges_refused = 0

    def refuse(self, region: int, first_page: int, page_count: int, kind: int) -> None:
        self.extents.append((region, first_page, page_count, kind))
        self.ranges_refused += 1

    def add_zero(self, region: int, first_page: int, page_count: int) -> None:
        self.pages_zero += page_count
        self._extend(region, first_page, page_count, ZERO)

    def add_data(self, region: int, first_page: int, page_count: int, data: bytes) -> None:
        self.pages_data += page_count
        self._extend(region, first_page, page_count, DATA)
        self.data.append(data)
        self.data_bytes += len(data)

    def _extend(self, region: int, first_page: int, page_count: int, kind: int) -> None:
        """A run that goes on where the last one ended makes it longer."""
        if self.extents:
            last_region, last_first, last_count, last_kind = self.extents[-1]
            if last_kind == kind and last_region == region and last_first + last_count == first_page:
                self.extents[-1] = (region, last_first, last_count + page_count, kind)
                return
        self.extents.append((region, first_page, page_count, kind))


class Answering:
    """The requests of one stream and their answers.

    Args:
        memory: what is served; its `readable` and `generation` are looked at for every batch.
        limits: what the client was told.
        stats: counted here.
        clock_us: a monotonic clock.
        lone: answers requests for one page at once; streams may share it. None: `lone_answer` has none.
    """

    def __init__(
        self,
        memory: ServedMemory,
        limits: LaneLimits,
        stats: LaneStats,
        clock_us: Callable[[], int],
        lone: LoneAnswers | None = None,
    ) -> None:
        geometry = [(region.size_bytes // region.page_size_bytes, region.page_size_bytes) for region in memory.regions]
        self.line = WaitingLine(geometry, limits)
        self._memory = memory
        self._lone = lone
        self._limits = limits
        self._stats = stats
        self._clock_us = clock_us

    def receive(self, message: bytes) -> None:
        """A request has come.

        Raises:
            google.protobuf.message.DecodeError: it is no FetchRequest; the stream cannot go on.
        """
        request = pb.FetchRequest.FromString(message)
        ranges = [(item.region, item.first_page, item.page_count) for item in request.ranges]
        self.line.push(request.request_id, request.priority, ranges, self._clock_us())
        self._count_request(request.priority)

    def lone_answer(self, message: bytes) -> LoneAnswer | None:
        """The answer to a request that has come while nothing else waits, if it asks for one page that has data.

        Returns:
            To be sent; then say `lone_answered`. None: it is something else, for `receive`.
        """
        memory = self._memory
        if self._lone is None or self.line or not memory.readable:
            return None
        return self._lone.answer(message, memory.generation)

    def lone_answered(self, answer: LoneAnswer) -> None:
        """Counts what was sent: a thread waits for it."""
        frame, priority, read_us = answer
        stats = self._stats
        self._count_request(priority)
        stats.batches += 1
        stats.pages_data += 1
        stats.bytes += len(frame) - LENGTH_BYTES
        stats.queue.observe(0)
        stats.read.observe(read_us)

    def next_batch(self) -> bytes | None:
        """The wire bytes of the next batch, or None when nothing waits."""
        pieces = self.next_pieces()
        return None if pieces is None else b"".join(pieces)

    def next_pieces(self) -> list[bytes] | None:
        """The wire bytes of the next batch in pieces, its pages not copied, or None when nothing waits."""
        if not self.line:
            return None
        started_us = self._clock_us()
        oldest_us = started_us
        batch = _Batch()
        max_bytes = self._limits.max_batch_bytes
        max_read_bytes = READS_PER_BATCH_MAX * max_bytes
        while (piece := self.line.take(max_bytes - batch.data_bytes)) is not None:
            oldest_us = min(oldest_us, piece.arrived_us)
            self._answer(piece, batch)
            if piece.done_request_id is not None:
                batch.done.append(piece.done_request_id)
            if (
                len(batch.extents) > EXTENTS_PER_BATCH_MAX // 2
                or len(batch.done) >= DONE_PER_BATCH_MAX
                or batch.read_bytes >= max_read_bytes
            ):
                break
        return self._pack(batch, started_us, started_us - oldest_us)

    def _answer(self, piece: Piece, batch: _Batch) -> None:
        region, first, count, kind, _, _ = piece
        if kind != DATA:
            batch.refuse(region, first, count, kind)
        elif not self._memory.readable:
            batch.refuse(region, first, count, NOT_FROZEN)
        else:
            self._read(region, first, count, batch)

    def _read(self, region_id: int, first: int, count: int, batch: _Batch) -> None:
        region = self._memory.regions[region_id]
        hole = region.zero_pages_ahead(first, count)
        if hole:
            batch.add_zero(region_id, first, hole)
            first += hole
            count -= hole
            batch.read_bytes += region.page_size_bytes  # looking for holes is work too
            if not count:
                return
        try:
            block = region.read(first, count)
        except OSError:
            self._read_one_by_one(region_id, first, count, batch)
            return
        batch.read_bytes += len(block)
        if count == 1:
            if block == zero_block(len(block)):
                batch.add_zero(region_id, first, 1)
            else:
                batch.add_data(region_id, first, 1, block)
            return
        self._add_runs(region, region_id, first, block, batch)

    @staticmethod
    def _add_runs(region: PageRegion, region_id: int, first: int, block: bytes, batch: _Batch) -> None:
        size = region.page_size_bytes
        for run in runs(block, size):
            if run.is_zero:
                batch.add_zero(region_id, first + run.first, run.count)
                continue
            is_whole = run.count * size == len(block)
            data = block if is_whole else block[run.first * size : (run.first + run.count) * size]
            batch.add_data(region_id, first + run.first, run.count, data)

    def _read_one_by_one(self, region_id: int, first: int, count: int, batch: _Batch) -> None:
        """Something in the block is unreadable: only those pages get the error."""
        region = self._memory.regions[region_id]
        for page in range(first, first + count):
            try:
                block = region.read(page, 1)
            except OSError:
                batch.refuse(region_id, page, 1, IO_ERROR)
            else:
                self._add_runs(region, region_id, page, block, batch)

    def _pack(self, batch: _Batch, started_us: int, queue_us: int) -> list[bytes]:
        generation = self._memory.generation
        checksum = batch_checksum(batch.done, batch.extents, generation, batch.data)
        read_us = self._clock_us() - started_us
        pieces = encode_pieces(
            batch.done,
            batch.extents,
            checksum,
            batch.data,
            generation,
            server_queue_us=queue_us,
            server_read_us=read_us,
        )
        self._count(batch, sum(map(len, pieces)), queue_us, read_us)
        return pieces

    def _count_request(self, priority: int) -> None:
        self._stats.requests += 1
        self._stats.faults += 0 < priority <= _LAST_OF_FAULTS

    def _count(self, batch: _Batch, size_bytes: int, queue_us: int, read_us: int) -> None:
        stats = self._stats
        stats.batches += 1
        stats.bytes += size_bytes
        stats.pages_data += batch.pages_data
        stats.pages_zero += batch.pages_zero
        stats.ranges_refused += batch.ranges_refused
        stats.queue.observe(queue_us)
        stats.read.observe(read_us)
