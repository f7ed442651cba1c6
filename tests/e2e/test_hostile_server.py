"""A receiver whose page server lies, and one whose attach socket is abused: nothing wrong gets in, the guest waits."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from conftest import why_not
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_client.demo.scene import SceneConfig
from farfault_client.demo.vms import VmmKind
from farfault_client.receive.journal import Journal
from farfault_shim.attach.wire import HANDOVER_BYTES_MAX
from faulty_move import FaultyMove
from hostile_server import BROKEN, MUTE, REFUSING, Answer, HostileExpress, HostileServer

pytestmark = pytest.mark.e2e

MIB = 1 << 20
GROWTH_BYTES_MAX = 64 * MIB
REQUESTS_PER_S_MAX = 500
"""A refusing server is asked again after 50 ms by each request that waits; without a pause it is tens of thousands."""
OBSERVE_S = 2.0
RTT_MS = 5
"""Faults are not capped: without a delay the guest has all of its memory within seconds, and the move has ended before
it is told to hurry."""


@pytest.fixture
def move() -> Iterator[FaultyMove]:
    """A move in the middle of its post-copy."""
    config = SceneConfig(VmmKind.REFERENCE, ram_bytes=32 * MIB, vcpus=2, receive_flags=("--bandwidth", str(MIB)))
    reason = why_not(config)
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="ff-hostile-"))
    with FaultyMove(config, folder, rtt_ms=RTT_MS) as made:
        made.start()
        made.begin()
        made.wait_postcopy()
        yield made
    shutil.rmtree(folder, ignore_errors=True)


def opened_as(move: FaultyMove) -> pb.OpenResponse:
    """What the honest server answers to this lease's holder: a hostile one knows it all."""

    async def ask() -> pb.OpenResponse:
        record = Journal(move.scene.folder / "receiver").record
        assert record is not None
        async with grpc.aio.insecure_channel(f"127.0.0.1:{move.ports[0]}") as channel:
            request = pb.OpenRequest(
                protocol_version=1,
                kind=pb.LEASE_KIND_MIGRATION,
                resume_lease_id=record.lease_id,
                resume_token=record.token,
            )
            response: pb.OpenResponse = await pages_pb2_grpc.PageServiceStub(channel).Open(request, timeout=10)
            return response

    return asyncio.run(ask())


def memory_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_harmless(move: FaultyMove, answer: Answer, opened: pb.OpenResponse, words: str = "") -> None:
    """Puts a hostile server in the honest one's place for a while; the status must tell of it in these words."""
    with HostileServer(move.ports[0], opened, answer) as hostile:
        move.processes.wait_until(lambda: hostile.requests > 0, f"{answer.__name__} is asked", 30)
        move.wait_still()
        pid = move.processes.pid("receive")
        settled, memory = move.settled_pages(), memory_bytes(pid)
        move.processes.wait_until(lambda: words in move.status().error, f"the status tells of {answer.__name__}", 40)
        requests, began = hostile.requests, time.monotonic()
        move.processes.wait_until(lambda: time.monotonic() > began + OBSERVE_S, "it was watched", 10 * OBSERVE_S)
        rate = (hostile.requests - requests) / (time.monotonic() - began)
        assert move.settled_pages() == settled, f"{answer.__name__}: pages were installed"
        assert memory_bytes(pid) - memory < GROWTH_BYTES_MAX, answer.__name__
        assert rate < REQUESTS_PER_S_MAX, f"{answer.__name__}: {rate:.0f} requests a second"
        assert move.is_alive("receive"), move.processes.tail("receive")


def test_lies_over_grpc_are_never_installed(move: FaultyMove) -> None:
    opened = opened_as(move)
    move.kill("serve")
    for answer in BROKEN:
        assert_harmless(move, answer, opened, "answers in a row")
    for answer in REFUSING:
        assert_harmless(move, answer, opened, "refuses pages")
    for answer in MUTE:
        assert_harmless(move, answer, opened)
    move.restart("serve")
    move.tune(0)
    move.assert_moved()


@pytest.mark.parametrize(
    "flood",
    [struct.pack("<I", 0xFFFF_FFFF) + bytes(1 << 16), struct.pack("<I", 1000) + b"\xff" * 1000, bytes(1 << 16)],
    ids=["huge frame", "no message", "empty messages"],
)
def test_lies_over_the_express_lane_are_never_installed(move: FaultyMove, flood: bytes) -> None:
    opened = opened_as(move)
    move.kill("serve")
    lanes = [pb.LaneAddress(kind=pb.LANE_KIND_EXPRESS, port=move.ports[1])]
    never = MUTE[0]
    with HostileExpress(move.ports[1], flood) as express, HostileServer(move.ports[0], opened, never, lanes):
        move.processes.wait_until(lambda: express.connections > 1, "it is tried again", 30)
        pid = move.processes.pid("receive")
        settled, memory = move.settled_pages(), memory_bytes(pid)
        move.processes.wait_until(lambda: express.connections > 3, "and again", 60)
        assert move.settled_pages() == settled
        assert memory_bytes(pid) - memory < GROWTH_BYTES_MAX
        assert move.is_alive("receive")
    move.restart("serve")
    move.tune(0)
    move.assert_moved()


def test_another_memory_or_generation_is_refused(move: FaultyMove) -> None:
    opened = opened_as(move)
    move.kill("serve")
    other = pb.OpenResponse()
    other.CopyFrom(opened)
    other.generation += 1
    larger = pb.OpenResponse()
    larger.CopyFrom(opened)
    larger.regions[0].size_bytes = 1 << 60
    for lie, word in ((other, "generation"), (larger, "more than")):
        with HostileServer(move.ports[0], lie, MUTE[0]):
            told = lambda word=word: word in move.status().error  # noqa: E731
            move.processes.wait_until(told, f"the status names the {word}", 40)
            assert move.is_alive("receive")
    move.restart("serve")
    move.tune(0)
    move.assert_moved()


def test_hostile_attach_peers_beside_an_honest_vmm(move: FaultyMove) -> None:
    attach = str(move.scene.attach)
    pid = move.processes.pid("receive")
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
    memory = memory_bytes(pid)

    def connected() -> socket.socket:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.settimeout(20)
        peer.connect(attach)
        return peer

    region = json.dumps([{"base_host_virt_addr": 4096, "size": 32 * MIB, "offset": 0, "page_size": 4096}])
    with tempfile.TemporaryFile() as file:
        for message, rights in (
            (b"\0" * 100, []),
            (b'[{"size": -1}]', []),
            (region.encode(), []),
            (region.encode(), [file.fileno()]),  # no userfaultfd
            (region.encode(), [file.fileno()] * 60),
            (b"[" * 100_000 + b"]" * 100_000, []),
            (b" " * (HANDOVER_BYTES_MAX + 10), []),
        ):
            with connected() as peer:
                try:
                    socket.send_fds(peer, [message], rights)
                    while peer.recv(4096):
                        continue
                except OSError:
                    pass  # it was turned away before it had said everything
    silent = []
    for _ in range(64):  # far more than are let in at one time; they say nothing
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.setblocking(False)
        try:
            peer.connect(attach)
        except BlockingIOError:
            peer.close()
            continue
        silent.append(peer)
    move.tune(0)
    move.processes.wait_until(
        lambda: move.receiver_step() != "running" or len(os.listdir(f"/proc/{pid}/fd")) <= descriptors + 2,  # noqa: PTH208
        "silent peers are turned away",
        30,
    )
    for peer in silent:
        peer.close()
    if move.is_alive("receive"):
        assert memory_bytes(pid) - memory < GROWTH_BYTES_MAX
    move.assert_moved()
