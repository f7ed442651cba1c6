"""VMMs that attach, good and hostile, over real sockets with real descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from farfault_cli.errors import UsageError
from farfault_shim.attach import listener as listener_module
from farfault_shim.attach.listener import DESCRIPTORS_MAX, PEERS_MAX, AttachListener
from farfault_shim.attach.state_area import StateArea
from farfault_shim.attach.vmm import AttachedVmm, VcpuChannel
from farfault_shim.attach.wire import (
    FRAME,
    HANDOVER_BYTES_MAX,
    STATE_BYTES,
    VCPU_HELLO,
    FrameType,
    Report,
    ReportKind,
    Slot,
    VcpuCounters,
    Verdict,
    VerdictKind,
)
from farfault_shim.layout import FlatOffset, Gpa
from farfault_shim.uffd import abi
from farfault_shim.uffd.userfaultfd import Userfaultfd, UserfaultfdUnavailableError

WAIT_S = 10.0
SIZE = 1 << 20


class Receiver:
    """What a listener calls."""

    def __init__(self) -> None:
        self.vmms: list[AttachedVmm] = []
        self.detached: list[AttachedVmm] = []
        self.reports: list[tuple[VcpuChannel, Report]] = []
        self.refusal: str | None = None

    def attached(self, vmm: AttachedVmm) -> None:
        self.vmms.append(vmm)
        if self.refusal is not None:
            vmm.refuse(self.refusal)
        else:
            vmm.start(lambda channel, report: self.reports.append((channel, report)))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the other side is the code under test, unhooked
            await asyncio.sleep(0.001)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
async def listener(tmp_path: Path, receiver: Receiver) -> AsyncIterator[AttachListener]:
    started = await AttachListener.start(tmp_path / "attach", receiver.attached, receiver.detached.append)
    yield started
    await started.close()


@pytest.fixture
def uffd() -> Iterator[int]:
    try:
        ours = Userfaultfd.create(abi.FEATURE_MISSING_SHMEM)
    except UserfaultfdUnavailableError as error:
        pytest.skip(str(error))
    yield ours.fileno()
    ours.close()


@pytest.fixture
def memory() -> Iterator[list[int]]:
    """A state area and one RAM file."""
    state, ram = os.memfd_create("farfault-test-state"), os.memfd_create("farfault-test-ram")
    os.ftruncate(state, STATE_BYTES)
    os.ftruncate(ram, SIZE)
    area = StateArea(state, writable=True)
    area.write_slots([Slot(0, 0, Gpa(0), SIZE, FlatOffset(0))])
    area.write_counters(3, VcpuCounters(0, 0, 0, 0, 0, 0, 0, 4711, 0))
    area.close()
    yield [state, ram]
    os.close(state)
    os.close(ram)


class Peer:
    """A VMM's end of the attach socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))
        self.socket.setblocking(False)

    def hand_over(self, descriptors: list[int], extension: dict[str, Any] | None) -> None:
        self.send(hand_over_json(extension), descriptors)

    def send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        socket.send_fds(self.socket, [data], descriptors or [])

    async def frame(self) -> tuple[FrameType, bytes]:
        """The next frame."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(WAIT_S):
            head = await loop.sock_recv(self.socket, FRAME.size)
            frame_type, length = FRAME.unpack(head)
            payload = await loop.sock_recv(self.socket, length) if length else b""
        return FrameType(frame_type), payload

    async def refusal(self) -> str:
        """The reason of a refusal, after which the connection ends."""
        frame_type, payload = await self.frame()
        assert frame_type is FrameType.REFUSED
        await self.ended()
        return payload.decode()

    async def ended(self) -> None:
        async with asyncio.timeout(WAIT_S):
            try:
                assert await asyncio.get_running_loop().sock_recv(self.socket, 1) == b""
            except ConnectionResetError:
                return

    def close(self) -> None:
        self.socket.close()


def hand_over_json(extension: dict[str, Any] | None) -> bytes:
    region: dict[str, Any] = {"base_host_virt_addr": 1 << 32, "size": SIZE, "offset": 0, "page_size": 4096}
    if extension is not None:
        region["farfault"] = {"version": 1} | extension
    return json.dumps([region]).encode()


FULL: dict[str, Any] = {"fault_source": "blocking", "fds": ["uffd", "state", "ram0"]}
SIMULATED: dict[str, Any] = {"fault_source": "simulated", "fds": ["state", "ram0"]}


@pytest.fixture
def peer(listener: AttachListener) -> Iterator[Peer]:
    ours = Peer(listener.path)
    yield ours
    ours.close()


def _open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def test_a_firecracker_vmm_attaches(peer: Peer, receiver: Receiver, uffd: int) -> None:
    peer.hand_over([uffd], None)
    await _until(lambda: len(receiver.vmms) == 1)
    (vmm,) = receiver.vmms
    assert vmm.handover.is_plain
    assert (vmm.pid, vmm.uid) == (os.getpid(), os.geteuid())
    assert vmm.slots() == []
    assert vmm.vcpu_tids() == {}
    peer.close()
    await _until(lambda: receiver.detached == [vmm])


async def test_a_vmm_of_ours_attaches_and_its_vcpus_talk(
    peer: Peer, receiver: Receiver, uffd: int, memory: list[int]
) -> None:
    peer.hand_over([uffd, *memory], FULL)
    assert await peer.frame() == (FrameType.READY, b"")
    (vmm,) = receiver.vmms
    assert vmm.slots() == [Slot(0, 0, Gpa(0), SIZE, FlatOffset(0))]
    assert vmm.vcpu_tids() == {4711: 3}
    assert os.fstat(vmm.ram_fds[0]).st_ino == os.fstat(memory[1]).st_ino

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.send(FRAME.pack(FrameType.VCPU, VCPU_HELLO.size) + VCPU_HELLO.pack(3, 4711), [theirs.fileno()])
    theirs.close()
    ours.send(Report(ReportKind.EXIT, 3, 1, gpa=4096).pack())
    await _until(lambda: len(receiver.reports) == 1)
    channel, report = receiver.reports[0]
    assert (channel.vcpu, report.gpa) == (3, 4096)
    channel.send_verdict(Verdict(report.seq, VerdictKind.RETRY))
    assert Verdict.unpack(ours.recv(100)) == Verdict(1, VerdictKind.RETRY)
    vmm.release()
    assert await peer.frame() == (FrameType.RELEASED, b"")
    ours.close()


async def test_a_vcpu_that_announces_itself_again_replaces_its_channel(
    peer: Peer, receiver: Receiver, memory: list[int]
) -> None:
    peer.hand_over(memory, SIMULATED)
    await peer.frame()
    ends = []
    for _ in range(2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        peer.send(FRAME.pack(FrameType.VCPU, VCPU_HELLO.size) + VCPU_HELLO.pack(0, 1), [theirs.fileno()])
        theirs.close()
        ends.append(ours)
    ends[1].send(Report(ReportKind.START, 0, 1).pack())
    await _until(lambda: len(receiver.reports) == 1)
    assert ends[0].recv(1) == b""
    for end in ends:
        end.close()


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        Report(ReportKind.EXIT, 1, 1).pack(),
        Report(ReportKind.EXIT, 0, 1).pack() + b"\0",
    ],
    ids=["nonsense", "another vCPU's", "oversize"],
)
async def test_a_vcpu_that_breaks_the_protocol_loses_its_channel_only(
    peer: Peer, receiver: Receiver, memory: list[int], data: bytes
) -> None:
    peer.hand_over(memory, SIMULATED)
    await peer.frame()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.send(FRAME.pack(FrameType.VCPU, VCPU_HELLO.size) + VCPU_HELLO.pack(0, 1), [theirs.fileno()])
    theirs.close()
    ours.setblocking(False)
    ours.send(data)
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(ConnectionResetError):  # it was closed with our message unread
            assert await asyncio.get_running_loop().sock_recv(ours, 1) == b""
    ours.close()
    assert receiver.reports == []
    assert receiver.detached == []


async def test_the_receivers_own_refusal_reaches_the_vmm(peer: Peer, receiver: Receiver, memory: list[int]) -> None:
    receiver.refusal = "not today"
    peer.hand_over(memory, SIMULATED)
    assert await peer.frame() == (FrameType.REFUSED, b"not today")


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        ({"fault_source": "blocking", "fds": ["uffd", "state"]}, "not a userfaultfd"),
        ({"fault_source": "blocking", "fds": ["state", "ram0"]}, "without a userfaultfd"),
        ({"fault_source": "simulated", "fds": ["ram0", "state"]}, "not a state area|cannot be mapped"),
        ({"fault_source": "simulated", "fds": ["state", "ram1"]}, "without a good descriptor"),
        ({"fault_source": "simulated", "fds": ["state", "state"]}, "two descriptors of one name"),
        ({"fault_source": "simulated", "fds": ["state"]}, "2 descriptors instead of 1"),
        ({"fault_source": "simulated", "fds": ["state", "ram0", "ram1"]}, "2 descriptors instead of 3"),
        ({"fault_source": "simulated", "fds": ["state", "ram0"], "version": 9}, "version 9"),
    ],
)
async def test_wrong_descriptors_are_refused_and_closed(
    peer: Peer, receiver: Receiver, memory: list[int], extension: dict[str, Any], reason: str
) -> None:
    before = _open_descriptors()
    peer.hand_over(memory, extension)
    refusal = await peer.refusal()
    assert re.search(reason, refusal), refusal
    assert receiver.vmms == []
    await _until(lambda: len(_open_descriptors()) <= len(before))


async def test_too_many_descriptors_in_one_message_are_refused_and_closed(peer: Peer, memory: list[int]) -> None:
    before = _open_descriptors()
    peer.hand_over([memory[1]] * (DESCRIPTORS_MAX + 1), SIMULATED)
    assert f"more than {DESCRIPTORS_MAX} descriptors" in await peer.refusal()
    await _until(lambda: len(_open_descriptors()) <= len(before))


async def test_too_many_descriptors_in_many_messages_are_refused_and_closed(peer: Peer, memory: list[int]) -> None:
    before = _open_descriptors()
    for _ in range(DESCRIPTORS_MAX // 32 + 1):
        peer.send(b" ", [memory[1]] * 32)
    assert f"more than {DESCRIPTORS_MAX} descriptors" in await peer.refusal()
    await _until(lambda: len(_open_descriptors()) <= len(before))


async def test_a_hand_over_in_pieces_is_put_together(peer: Peer, receiver: Receiver, memory: list[int]) -> None:
    text = hand_over_json(SIMULATED)
    cut = text.index(b"]") + 1  # looks like an end and is none
    peer.send(text[:cut], memory)
    await asyncio.sleep(0)
    peer.send(text[cut:])
    assert await peer.frame() == (FrameType.READY, b"")
    assert len(receiver.vmms) == 1


async def test_an_oversize_hand_over_is_refused(peer: Peer) -> None:
    async def flood() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(HANDOVER_BYTES_MAX // 1024 + 1):
            await loop.sock_sendall(peer.socket, b" " * 1024)

    async with asyncio.timeout(WAIT_S):
        await flood()
    assert "longer than" in await peer.refusal()


async def test_a_peer_that_hangs_up_or_says_nothing_is_dropped(
    listener: AttachListener, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "HANDOVER_TIMEOUT_S", 0.01)
    silent = Peer(listener.path)
    assert "no hand-over within" in await silent.refusal()
    silent.close()
    gone = Peer(listener.path)
    gone.close()
    assert receiver.vmms == []


async def test_peers_are_bounded(listener: AttachListener) -> None:
    peers = [Peer(listener.path) for _ in range(PEERS_MAX + 1)]
    await peers[-1].ended()
    for peer in peers:
        peer.close()


async def test_another_user_may_not_attach_unless_allowed(
    tmp_path: Path, receiver: Receiver, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel reports our own uid; so the receiver is told that it is somebody else.
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    real = socket.socket.getsockopt

    def stranger(self: socket.socket, level: int, option: int, *rest: int) -> Any:
        answer = real(self, level, option, *rest)
        return struct.pack("iII", 1, 4242, 0) if option == socket.SO_PEERCRED else answer

    monkeypatch.setattr(listener_module.socket.socket, "getsockopt", stranger, raising=False)
    for allowed, accepted in (((), False), ((4242,), True)):
        listener = await AttachListener.start(
            tmp_path / f"attach{accepted}", receiver.attached, receiver.detached.append, allowed
        )
        peer = Peer(listener.path)
        peer.hand_over(memory, SIMULATED)
        if accepted:
            assert await peer.frame() == (FrameType.READY, b"")
        else:
            assert "user 4242 may not attach" in await peer.refusal()
        peer.close()
        await listener.close()


@pytest.mark.parametrize(
    "data",
    [
        FRAME.pack(99, 0),
        FRAME.pack(FrameType.READY, 0),
        FRAME.pack(FrameType.VCPU, 1 << 31),
        FRAME.pack(FrameType.VCPU, VCPU_HELLO.size) + VCPU_HELLO.pack(1024, 1),
        FRAME.pack(FrameType.VCPU, VCPU_HELLO.size) + VCPU_HELLO.pack(0, 1),
    ],
    ids=["unknown", "not a VMM's", "too long", "no such vCPU", "no descriptor"],
)
async def test_a_bad_frame_ends_the_connection(peer: Peer, receiver: Receiver, memory: list[int], data: bytes) -> None:
    before = _open_descriptors()
    peer.hand_over(memory, SIMULATED)
    await peer.frame()
    peer.send(data, [memory[0]] if b"\0\4\0\0" in data else [])
    frame_type, _ = await peer.frame()
    assert frame_type is FrameType.REFUSED
    await peer.ended()
    assert len(receiver.detached) == 1
    await _until(lambda: len(_open_descriptors()) <= len(before))


async def test_a_descriptor_that_is_no_socket_is_no_vcpu(peer: Peer, receiver: Receiver, memory: list[int]) -> None:
    before = _open_descriptors()
    peer.hand_over(memory, SIMULATED)
    await peer.frame()
    peer.send(FRAME.pack(FrameType.VCPU, VCPU_HELLO.size) + VCPU_HELLO.pack(0, 1), [memory[0]])
    frame_type, _ = await peer.frame()
    assert frame_type is FrameType.REFUSED
    await _until(lambda: len(receiver.detached) == 1 and len(_open_descriptors()) <= len(before))


async def test_a_stale_socket_file_is_replaced_and_a_live_one_is_not(tmp_path: Path, receiver: Receiver) -> None:
    path = tmp_path / "attach"
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(path))
    stale.close()
    first = await AttachListener.start(path, receiver.attached, receiver.detached.append)
    with pytest.raises(UsageError, match="another process listens"):
        await AttachListener.start(path, receiver.attached, receiver.detached.append)
    await first.close()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UsageError, match="no socket is in the way"):
        await AttachListener.start(path, receiver.attached, receiver.detached.append)
    assert path.read_text() == "precious"
    with pytest.raises(UsageError, match="longer than 107 bytes"):
        await AttachListener.start(tmp_path / ("x" * 108), receiver.attached, receiver.detached.append)
