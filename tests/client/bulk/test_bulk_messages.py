"""What the receiver and its bulk process say to each other comes out as it went in."""

from __future__ import annotations

import pytest
from farfault.v1 import pages_pb2 as pb
from farfault_client.bulk.messages import (
    MESSAGE_BYTES_MAX,
    PLACEMENTS_PER_PACKET_MAX,
    Connect,
    MessageType,
    Target,
    pack_placed,
    unpack_placed,
)
from farfault_client.engine import Extent, ExtentResult
from farfault_client.session.answers import DONE_MAX, EXTENTS_MAX, Placement
from farfault_shim.attach.wire import FaultSource, HandOver, HandOverRegion
from farfault_shim.layout import PageIndex, PageRun


def run(first: int, count: int = 1) -> PageRun:
    return PageRun(PageIndex(first), count)


def test_connect() -> None:
    connect = Connect("host:7", True, "/tls", "id", "token", 3, [(8192, 4096), (2 << 20, 2 << 20)], 2)
    packet = connect.pack()
    assert packet[0] == MessageType.CONNECT
    assert Connect.unpack(packet[1:]) == connect


@pytest.mark.parametrize("with_digest", [False, True])
def test_target(with_digest: bool) -> None:
    regions = (HandOverRegion(0x7000, 0x9000, 8192, 0, 4096), HandOverRegion(0xA000, 0, 4096, 8192, 4096))
    target = Target(HandOver(regions, FaultSource.STOCK_NOWAIT, ("uffd", "alias_uffd")), with_digest)
    packet = target.pack()
    assert packet[0] == MessageType.TARGET
    assert Target.unpack(packet[1:]) == target


def test_no_target() -> None:
    assert Target.unpack(b"") is None


def test_placed() -> None:
    placements = [Placement(run(3, 5), False, 2**64 - 1), Placement(run(2**40), True, 0)]
    extents = [(run(9, 2), int(pb.EXTENT_KIND_ZERO)), (run(20), int(pb.EXTENT_KIND_NOT_FROZEN))]
    (packet,) = pack_placed(4711, (12, 34), 6, (1, 2**63), placements, extents)
    assert packet[0] == MessageType.PLACED
    wire_bytes, placed = unpack_placed(packet)
    assert wire_bytes == 4711
    assert placed.placements == placements
    assert placed.extents == [Extent(run(9, 2), ExtentResult.ZERO), Extent(run(20), ExtentResult.REFUSED)]
    assert placed.refusals == ("NOT_FROZEN",)
    assert (placed.done, placed.clipped_pages) == ((1, 2**63), 6)
    assert (placed.server_queue_us, placed.server_read_us) == (12, 34)


def test_the_largest_answer_fits_into_packets_and_ends_its_requests_last() -> None:
    placements = [Placement(run(2 * page), bool(page % 2), page) for page in range(3 * PLACEMENTS_PER_PACKET_MAX)]
    extents = [(run(page), int(pb.EXTENT_KIND_ZERO)) for page in range(EXTENTS_MAX)]
    packets = list(pack_placed(1, (0, 0), 0, range(DONE_MAX), placements, extents))
    assert max(map(len, packets)) <= MESSAGE_BYTES_MAX
    parts = [unpack_placed(packet)[1] for packet in packets]
    assert [placement for part in parts for placement in part.placements] == placements
    assert [bool(part.done) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(unpack_placed(packet)[0] for packet in packets) == 1
