"""The VMM's side of the attach protocol, against the real listener."""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from farfault_cli.errors import UnreachableError
from farfault_shim.attach import client as client_module
from farfault_shim.attach.client import RELEASED_RETRIES_MAX, AttachClient, RamBlock
from farfault_shim.attach.listener import AttachListener
from farfault_shim.attach.vmm import AttachedVmm, VcpuChannel
from farfault_shim.attach.wire import (
    FRAME,
    FRAME_BYTES_MAX,
    FaultSource,
    FrameType,
    HandOver,
    Report,
    ReportKind,
    Slot,
    Verdict,
    VerdictKind,
)
from farfault_shim.kvm.abi import EXIT_MMIO
from farfault_shim.layout import FlatOffset, Gpa
from farfault_shim.uffd.userfaultfd import Userfaultfd, UserfaultfdUnavailableError
from tiny_receiver import TinyReceiver

PAGE = 4096
RAM_BYTES = 64 * PAGE
WAIT_S_MAX = 20.0
_numbers = itertools.count()


def userfaultfd_works() -> bool:
    try:
        Userfaultfd.create().close()
    except UserfaultfdUnavailableError:
        return False
    return True


needs_userfaultfd = pytest.mark.skipif(not userfaultfd_works(), reason="this user may not make a userfaultfd")


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline, f"not in {WAIT_S_MAX} s: {what}"
        time.sleep(0.002)


@pytest.fixture
def source() -> Iterator[Path]:
    """A file in which each page begins with its number."""
    path = Path(f"/dev/shm/ff-{os.getpid()}-attach-{next(_numbers)}")
    path.write_bytes(b"".join(number.to_bytes(8, "little").ljust(PAGE, b".") for number in range(RAM_BYTES // PAGE)))
    yield path
    path.unlink()


@pytest.fixture
def ram() -> Iterator[int]:
    descriptor = os.memfd_create("ram")
    os.ftruncate(descriptor, RAM_BYTES)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def simulated(ram: int, tmp_path: Path) -> Iterator[AttachClient]:
    """A client that watches nothing, not started."""
    slots = [Slot(0, 0, Gpa(0), RAM_BYTES, FlatOffset(0))]
    client = AttachClient(tmp_path / "ff.sock", [RamBlock(ram, RAM_BYTES, PAGE)], FaultSource.SIMULATED, slots)
    yield client
    client.close()


def exit_report(gpa: int, **changes: int) -> Report:
    report = Report(ReportKind.EXIT, 0, seq=0, ret=-1, err=14, exit_reason=39, gpa=gpa, size=PAGE)
    return report._replace(address_source=1, **changes)  # type: ignore[arg-type]


@needs_userfaultfd
def test_a_vmm_gets_its_memory_in_a_few_lines(source: Path, ram: int, tmp_path: Path) -> None:
    with TinyReceiver(tmp_path / "ff.sock", source) as receiver:
        memory = mmap.mmap(ram, RAM_BYTES, flags=mmap.MAP_SHARED)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        client = AttachClient(tmp_path / "ff.sock", [RamBlock(ram, RAM_BYTES, address)])
        client.start()
        client.wait_ready(timeout_s=10)

        assert _read_as_a_guest_does(memory, 7 * PAGE) == 7
        wait_for(lambda: receiver.pages.present == {7}, "the receiver to note its page")
        receiver.release()
        assert client.released.wait(WAIT_S_MAX)
        assert [memory[page * PAGE] for page in range(RAM_BYTES // PAGE)] == list(range(RAM_BYTES // PAGE))
        client.close()
        memory.close()


def _read_as_a_guest_does(memory: mmap.mmap, offset: int) -> int:
    """A system call reads it, so that only this thread waits and the GIL is free, as in KVM_RUN."""
    reader, writer = os.pipe()
    os.write(writer, memoryview(memory)[offset : offset + 8])
    data = os.read(reader, 8)
    os.close(reader)
    os.close(writer)
    return int.from_bytes(data, "little")


def test_the_hand_over_says_everything(simulated: AttachClient, ram: int) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(simulated.path))
        listening.listen()
        simulated.start()
        connection, _ = listening.accept()
        with connection:
            data, descriptors, _, _ = socket.recv_fds(connection, 65536, 8)
            handover = HandOver.parse(data)
            assert handover.fault_source is FaultSource.SIMULATED
            assert handover.descriptors == ("state", "ram0")
            assert len(descriptors) == 2
            assert os.fstat(descriptors[1]).st_ino == os.fstat(ram).st_ino
            for descriptor in descriptors:
                os.close(descriptor)


def test_exits_are_asked_and_answered(simulated: AttachClient, source: Path) -> None:
    with TinyReceiver(simulated.path, source) as receiver:
        simulated.start()
        simulated.wait_ready(10)
        link = simulated.vcpu(0)
        verdict = link.ask(exit_report(5 * PAGE), lambda: False)
        assert verdict is not None
        assert verdict.verdict is VerdictKind.RETRY
        assert receiver.gpas == [5 * PAGE]
        counters = simulated.state.counters(0)
        assert counters.thread_id == threading.get_native_id()
        assert counters.blocked_ns > 0
        assert not counters.waiting


def test_a_kick_ends_the_wait_and_the_late_verdict_is_dropped(simulated: AttachClient, source: Path) -> None:
    with TinyReceiver(simulated.path, source) as receiver:
        simulated.start()
        simulated.wait_ready(10)
        receiver.holding.set()
        link = simulated.vcpu(0)
        kicked = threading.Event()

        def kick() -> None:
            wait_for(lambda: len(receiver.reports) == 1, "the report")
            kicked.set()
            simulated.wake(0)
            simulated.wake(99)

        kicker = threading.Thread(target=kick)
        kicker.start()
        assert link.ask(exit_report(PAGE), kicked.is_set) is None
        kicker.join()
        assert simulated.state.counters(0).kicks == 1
        receiver.let_go()
        verdict = link.ask(exit_report(2 * PAGE), lambda: False)
        assert verdict is not None
        assert verdict.seq == 2


def test_a_vcpu_waits_for_the_next_receiver(simulated: AttachClient, source: Path) -> None:
    simulated.start()
    verdicts: list[Verdict | None] = []

    def vcpu() -> None:
        link = simulated.vcpu(0)
        for gpa in (PAGE, 2 * PAGE):
            verdicts.append(link.ask(exit_report(gpa), lambda: False))

    thread = threading.Thread(target=vcpu)
    thread.start()
    wait_for(lambda: simulated.state.counters(0).waiting == 1, "the vCPU to wait")
    with pytest.raises(UnreachableError, match="farfault receive"):
        simulated.wait_ready(0)
    with TinyReceiver(simulated.path, source) as first:
        first.holding.set()
        wait_for(lambda: len(first.reports) == 1, "the report")
    with TinyReceiver(simulated.path, source) as second:
        thread.join(WAIT_S_MAX)
        assert [report.gpa for report in second.reports] == [PAGE, 2 * PAGE]
    assert len(verdicts) == 2


def test_release_answers_who_still_waits(simulated: AttachClient, source: Path) -> None:
    released = threading.Event()
    simulated._on_released = released.set
    with TinyReceiver(simulated.path, source) as receiver:
        simulated.start()
        simulated.wait_ready(10)
        receiver.holding.set()
        verdicts: list[Verdict | None] = []
        thread = threading.Thread(target=lambda: verdicts.append(simulated.vcpu(0).ask(exit_report(PAGE), bool)))
        thread.start()
        wait_for(lambda: len(receiver.reports) == 1, "the report")
        receiver.release()
        thread.join(WAIT_S_MAX)
        assert released.wait(WAIT_S_MAX)
    assert [verdict.verdict for verdict in verdicts if verdict] == [VerdictKind.RETRY]
    mmio = simulated.vcpu(1).ask(exit_report(PAGE, ret=0, err=0, exit_reason=EXIT_MMIO), bool)
    assert mmio is not None
    assert mmio.verdict is VerdictKind.COMPLETE


async def test_refusal_is_logged_and_tried_again(
    simulated: AttachClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "REFUSED_RETRY_S", 0.01)
    attached: list[AttachedVmm] = []
    ready = asyncio.Event()

    def on_attached(vmm: AttachedVmm) -> None:
        attached.append(vmm)
        if len(attached) < 3:
            vmm.refuse("another VM is here")
        else:
            vmm.start(lambda channel, report: None)
            ready.set()

    listener = await AttachListener.start(simulated.path, on_attached, lambda vmm: None)
    simulated.start()
    await asyncio.wait_for(ready.wait(), WAIT_S_MAX)
    await asyncio.to_thread(simulated.wait_ready, WAIT_S_MAX)
    assert caplog.text.count("refused this VM: another VM is here") == 2
    await listener.close()


@pytest.mark.parametrize(
    "frame", [FRAME.pack(77, 0), FRAME.pack(FrameType.READY, FRAME_BYTES_MAX + 1)], ids=["unknown type", "too long"]
)
def test_a_receiver_that_talks_nonsense_is_left(
    simulated: AttachClient, frame: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "REFUSED_RETRY_S", 0.01)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(simulated.path))
        listening.listen()
        simulated.start()
        for _ in range(2):
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(frame)
                assert connection.recv(1) == b""


async def test_garbage_on_a_channel_is_no_verdict(simulated: AttachClient) -> None:
    seen: list[Report] = []

    def on_report(channel: VcpuChannel, report: Report) -> None:
        seen.append(report)
        if len(seen) == 1:
            channel._socket.send(b"garbage")
            channel.close()

    vmms: list[AttachedVmm] = []

    def on_attached(vmm: AttachedVmm) -> None:
        vmms.append(vmm)
        vmm.start(on_report)

    listener = await AttachListener.start(simulated.path, on_attached, lambda vmm: None)
    simulated.start()
    await asyncio.to_thread(simulated.wait_ready, WAIT_S_MAX)
    kicked = threading.Event()
    asked = asyncio.create_task(asyncio.to_thread(lambda: simulated.vcpu(0).ask(exit_report(PAGE), kicked.is_set)))
    await asyncio.to_thread(wait_for, lambda: len(seen) == 1, "the report")
    assert not asked.done()
    kicked.set()
    assert await asked is None
    await listener.close()


def test_closing_a_client_that_never_reached_anybody(ram: int, tmp_path: Path) -> None:
    client = AttachClient(tmp_path / "ff.sock", [RamBlock(ram, RAM_BYTES, PAGE)], FaultSource.SIMULATED)
    client.close()
    client = AttachClient(tmp_path / "ff.sock", [RamBlock(ram, RAM_BYTES, PAGE)], FaultSource.SIMULATED)
    client.start()
    client.close()


@needs_userfaultfd
def test_memory_that_cannot_be_watched_leaves_nothing_open(ram: int, tmp_path: Path) -> None:
    before = _open_descriptors()
    with pytest.raises(OSError, match="Invalid argument"):
        AttachClient(tmp_path / "ff.sock", [RamBlock(ram, RAM_BYTES, base_hva=PAGE)])
    assert _open_descriptors() == before


def _open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_after_the_release_an_exit_that_comes_again_and_again_is_the_vmm_s(simulated: AttachClient) -> None:
    simulated.released.set()
    link = simulated.vcpu(0)
    verdicts = [link.ask(exit_report(PAGE), lambda: False) for _ in range(RELEASED_RETRIES_MAX + 1)]
    assert [verdict.verdict for verdict in verdicts if verdict] == [VerdictKind.RETRY] * RELEASED_RETRIES_MAX + [
        VerdictKind.PASS
    ]
    elsewhere = link.ask(exit_report(2 * PAGE), lambda: False)
    assert elsewhere is not None
    assert elsewhere.verdict is VerdictKind.RETRY
