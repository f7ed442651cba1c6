"""The receiver's end of the bulk process, against a process that the test plays."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest
from farfault.v1 import pages_pb2 as pb
from farfault_client.bulk import lane as module
from farfault_client.bulk.lane import ProcessLane
from farfault_client.bulk.messages import MESSAGE_BYTES_MAX, REQUEST_HEAD, MessageType
from farfault_client.session.answers import Answer, Placed
from farfault_client.session.lane import Lane, LaneLostError, LaneStats
from farfault_client.session.lease import Lease, Peer
from farfault_shim.layout import Layout

LEASE = Lease("lease", "token", 3, Layout([(1 << 20, 4096)]))
TIMEOUT_S = 10.0


class Host:
    """Stands for `BulkHost`."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.theirs.settimeout(TIMEOUT_S)
        self.is_closed = False

    def connection(self) -> socket.socket:
        return self.ours

    def close(self) -> None:
        self.is_closed = True

    def told(self) -> tuple[int, bytes]:
        packet = self.theirs.recv(MESSAGE_BYTES_MAX)
        return packet[0], packet[1:]


class User:
    """Has requests to send."""

    def __init__(self) -> None:
        self.requests = [pb.FetchRequest(request_id=number) for number in (1, 2)]

    def next_request(self, lane: Lane) -> pb.FetchRequest | None:
        return self.requests.pop(0) if self.requests else None

    def answered(self, lane: Lane, answer: Answer) -> None: ...

    def placed(self, lane: Lane, placed: Placed) -> None: ...

    def lane_lost(self, lane: Lane) -> None: ...


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.ours.close()
    host.theirs.close()


def lane_of(host: Host, user: User, ready: asyncio.Event) -> ProcessLane:
    return ProcessLane(
        host,  # type: ignore[arg-type]
        Peer("127.0.0.1:1"),
        LEASE,
        user,
        LaneStats(),
        streams=0,
        on_ready=ready.set,
    )


async def test_nothing_is_asked_for_before_the_process_is_connected(host: Host) -> None:
    user, ready = User(), asyncio.Event()
    lane = lane_of(host, user, ready)
    running = asyncio.ensure_future(lane.run())
    assert host.told()[0] == MessageType.CONNECT
    lane.pump()
    await asyncio.sleep(0)
    assert (lane.is_ready, ready.is_set(), len(user.requests)) == (False, False, 2)
    host.theirs.send(bytes([MessageType.CONNECTED]))
    async with asyncio.timeout(TIMEOUT_S):
        await ready.wait()
    assert lane.is_ready
    for number in (1, 2):
        kind, payload = host.told()
        assert kind == MessageType.REQUEST
        assert pb.FetchRequest.FromString(payload[REQUEST_HEAD.size :]).request_id == number
    running.cancel()
    await lane.close()


async def test_a_process_that_does_not_connect_is_given_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READY_TIMEOUT_S", 0.01)
    lane = lane_of(host, User(), asyncio.Event())
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(LaneLostError, match="did not connect"):
            await lane.run()
    assert host.is_closed
    await lane.close()


async def test_a_process_that_cannot_connect_says_why(host: Host) -> None:
    lane = lane_of(host, User(), asyncio.Event())
    host.theirs.send(bytes([MessageType.LOST, 0]) + b"nobody there")
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(LaneLostError, match="nobody there"):
            await lane.run()
    assert not lane.is_ready
    await lane.close()
