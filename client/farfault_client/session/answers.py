"""Between the engine's pages and the wire's ranges; an answer is verified here before anyone sees it. No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from farfault.checksum import batch_checksum
from farfault.codec import DecodedBatch
from farfault.v1 import pages_pb2 as pb
from farfault_shim.layout import Layout, PageIndex, PageRun

from farfault_client.engine import Extent, ExtentResult, Fetch

EXTENTS_MAX = 4096
"""Extents in one answer; more is an error of the server."""
DONE_MAX = 4096
"""Requests that one answer ends; more is an error of the server, which holds far fewer."""


class BadAnswerError(Exception):
    """An answer that breaks the contract: it is thrown away whole and its pages are fetched again."""


class Answer(NamedTuple):
    """A verified answer.

    Attributes:
        extents: in the order of `data`.
        data, data_offset: the bytes of the DATA extents begin there.
        done: request ids answered in full.
        refusals: names of the statuses of refused extents, e.g. ``NOT_FROZEN``.
        server_queue_us, server_read_us: the server's own measure of its two stages.
    """

    extents: list[Extent]
    data: bytes
    data_offset: int
    done: tuple[int, ...]
    refusals: tuple[str, ...]
    server_queue_us: int
    server_read_us: int


class LonePage(NamedTuple):
    """A verified answer that brought one page and nothing else, and was dealt with at first hand.

    Attributes:
        request_id: that it answers.
        page: of the guest.
        end: of the answer's frame, within the bytes that came.
        data_at: of the page, within the same.
        server_queue_us, server_read_us: as of `Answer`.
    """

    request_id: int
    page: int
    end: int
    data_at: int
    server_queue_us: int
    server_read_us: int


class Placement(NamedTuple):
    """Pages that are in guest memory.

    Attributes:
        run: the pages.
        existed: somebody else had installed them.
        digest: of what was installed (`farfault.digest.pages_digest`); 0 where nobody asked for it.
    """

    run: PageRun
    existed: bool
    digest: int


class Placed(NamedTuple):
    """A verified answer whose pages another process has put into guest memory.

    Attributes:
        placements: what is in memory now.
        extents: those without data, zero or refused.
        done, refusals, server_queue_us, server_read_us: as of `Answer`.
        clipped_pages: pages with data that were left out, as nobody asked for them or they were removed since.
    """

    placements: list[Placement]
    extents: list[Extent]
    done: tuple[int, ...]
    refusals: tuple[str, ...]
    clipped_pages: int
    server_queue_us: int
    server_read_us: int


def sort_extents(extents: Iterable[tuple[PageRun, int]]) -> tuple[list[Extent], tuple[str, ...]]:
    """Runs with their kinds on the wire as extents, and the names of the refusals among them."""
    found, refusals = [], []
    for run, kind in extents:
        result = _RESULTS.get(kind, ExtentResult.REFUSED)
        if result is ExtentResult.REFUSED:
            refusals.append(_status_name(kind))
        found.append(Extent(run, result))
    return found, tuple(refusals)


def request_of(fetch: Fetch, layout: Layout) -> pb.FetchRequest:
    """The wire form of a request."""
    ranges = []
    for run in fetch.runs:
        region = layout.region_of_page(run.first)
        ranges.append(pb.PageRange(region=region.index, first_page=run.first - region.first_page, page_count=run.count))
    return pb.FetchRequest(request_id=fetch.request_id, priority=int(fetch.priority), ranges=ranges)  # type: ignore[arg-type]


_RESULTS: dict[int, ExtentResult] = {pb.EXTENT_KIND_DATA: ExtentResult.DATA, pb.EXTENT_KIND_ZERO: ExtentResult.ZERO}


def verify(decoded: DecodedBatch, layout: Layout, generation: int) -> Answer:
    """Checks an answer: generation, ranges, length and checksum.

    Args:
        decoded: the answer.
        layout: guest memory.
        generation: that the answer must be of.

    Raises:
        BadAnswerError: with what is wrong; nothing of the answer may be used.
    """
    batch = decoded.header
    if batch.generation != generation:
        raise BadAnswerError(f"memory generation {batch.generation} instead of {generation}: the source VM has run")
    if len(batch.extents) > EXTENTS_MAX:
        raise BadAnswerError(f"{len(batch.extents)} extents, more than {EXTENTS_MAX}")
    done = tuple(batch.done_request_ids)
    if len(done) > DONE_MAX:
        raise BadAnswerError(f"{len(done)} requests done, more than {DONE_MAX}")
    on_the_wire = [(extent.region, extent.first_page, extent.page_count, extent.kind) for extent in batch.extents]
    extents: list[Extent] = []
    refusals: list[str] = []
    expected_bytes = 0
    regions = layout.regions
    for region_id, first_page, page_count, kind in on_the_wire:
        if region_id >= len(regions):
            raise BadAnswerError(f"region {region_id} of {len(regions)}")
        region = regions[region_id]
        if page_count < 1 or first_page + page_count > region.page_count:
            raise BadAnswerError(
                f"pages {first_page}+{page_count} of region {region_id}, which has {region.page_count}"
            )
        result = _RESULTS.get(kind, ExtentResult.REFUSED)
        if result is ExtentResult.DATA:
            expected_bytes += page_count * region.page_size_bytes
        elif result is ExtentResult.REFUSED:
            refusals.append(_status_name(kind))
        extents.append(Extent(PageRun(PageIndex(region.first_page + first_page), page_count), result))
    if decoded.data_length != expected_bytes:
        raise BadAnswerError(f"{decoded.data_length} bytes of data for {expected_bytes} bytes of pages")
    if batch_checksum(done, on_the_wire, generation, (decoded.data,)) != batch.checksum:
        raise BadAnswerError(f"checksum of {expected_bytes} bytes does not match")
    return Answer(
        extents,
        decoded.buffer,  # type: ignore[arg-type]  # of a bulk stream it is a view of its buffer, which nobody looks at
        decoded.data_offset,
        done,
        tuple(refusals),
        batch.server_queue_us,
        batch.server_read_us,
    )


def _status_name(kind: int) -> str:
    try:
        return pb.ExtentKind.Name(kind).removeprefix("EXTENT_KIND_")
    except ValueError:
        return f"status {kind}"
