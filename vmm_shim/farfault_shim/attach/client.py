"""The VMM's side of the attach protocol, for VMMs in Python.

A VMM whose guest memory is a shared mapping of a file needs no more than this to get its pages from a
receiver; KVM sleeps in the kernel while a page is under way (blocking userfaultfd)::

    memory = mmap.mmap(ram_fd, size_bytes, flags=mmap.MAP_SHARED)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    client = AttachClient(Path("/run/farfault/attach.sock"), [RamBlock(ram_fd, size_bytes, address)])
    client.start()
    client.wait_ready(timeout_s=10)
    ... run the guest; client.released is set when the receiver is done ...

With exits instead (`FaultSource.STOCK_NOWAIT`: give each block an `alias_hva`, a second mapping of the file that
the memslots point to), each vCPU thread asks `client.vcpu(number).ask(report, kicked)` after an exit that may be
a far fault and obeys the verdict. `farfault_shim.refvmm.far_faults` shows the whole loop.

A dead receiver never turns into zero pages: the userfaultfds stay open here, the guest waits, and the
client hands over again for ever, every 100 ms. A Python VMM must not touch absent memory itself while it
holds the GIL: that would stop this client's thread as well.
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from farfault_cli.errors import UnreachableError

from farfault_shim.attach.state_area import StateArea
from farfault_shim.attach.wire import (
    FRAME,
    FRAME_BYTES_MAX,
    STATE_BYTES,
    VCPU_HELLO,
    VERDICT,
    AddressSource,
    FaultSource,
    FrameType,
    HandOver,
    HandOverRegion,
    ProtocolError,
    Report,
    Slot,
    VcpuCounters,
    Verdict,
    VerdictKind,
)
from farfault_shim.kvm.abi import EXIT_MMIO
from farfault_shim.uffd.abi import FEATURE_EVENT_REMOVE, FEATURE_SIGBUS, FEATURE_THREAD_ID
from farfault_shim.uffd.userfaultfd import Userfaultfd

logger = logging.getLogger(__name__)

RETRY_S: Final = 0.1
"""Between two attempts to reach the receiver."""
REFUSED_RETRY_S: Final = 1.0
"""After the receiver refused the hand-over."""
RELEASED_RETRIES_MAX: Final = 64
"""Restarts in a row at one address after the release; then the VMM gets the error."""
WAIT_POLL_S: Final = 0.02
"""A waiting vCPU looks at its kick at least this often."""


class RamBlock(NamedTuple):
    """A part of guest memory: a whole file, mapped shared.

    Attributes:
        descriptor: of the file; the caller keeps it open as long as the client lives.
        size_bytes: of the file and of the mapping.
        base_hva: address of the VMM's own mapping.
        alias_hva: address of the mapping that only KVM uses; 0: none.
        page_size_bytes: 4096, or the huge page size of a file on hugetlbfs.
    """

    descriptor: int
    size_bytes: int
    base_hva: int
    alias_hva: int = 0
    page_size_bytes: int = 4096


class AttachClient:
    """Hands guest memory to a receiver, again and again, until the receiver releases it.

    Memory is watched from the moment this is made: make it before anything touches absent pages.

    Args:
        path: of the receiver's unix socket; it need not be there yet.
        blocks: of guest memory, in the order in which the source's page server names them.
        fault_source: BLOCKING, STOCK_NOWAIT (every block has an alias), KERNEL_NOWAIT (the memslots carry the
            kernel's flag), or SIMULATED (nothing is watched).
        slots: memslots, in offsets of the blocks laid end to end; needed where vCPUs report exits.
        on_released: called once, on the client's thread, when the receiver has installed everything.

    Raises:
        UserfaultfdUnavailableError: this process may not make a userfaultfd.
        OSError: a mapping cannot be watched.
    """

    def __init__(
        self,
        path: Path,
        blocks: Sequence[RamBlock],
        fault_source: FaultSource = FaultSource.BLOCKING,
        slots: Sequence[Slot] = (),
        on_released: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self.released = threading.Event()
        self._on_released = on_released
        self._closing = threading.Event()
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._links: dict[int, VcpuLink] = {}
        self._connection: socket.socket | None = None
        self._uffds = _watch(blocks, fault_source)
        self._state_descriptor = os.memfd_create("farfault-state", os.MFD_CLOEXEC)
        os.ftruncate(self._state_descriptor, STATE_BYTES)
        self.state = StateArea(self._state_descriptor, writable=True)
        self.state.write_slots(slots)
        names = [*self._uffds, "state", *(f"ram{index}" for index in range(len(blocks)))]
        self._handover = HandOver(_regions(blocks), fault_source, tuple(names))
        self._descriptors = [
            *(uffd.fileno() for uffd in self._uffds.values()),
            self._state_descriptor,
            *(block.descriptor for block in blocks),
        ]
        self._thread = threading.Thread(target=self._main, name="attach", daemon=True)

    def start(self) -> None:
        """Connects from now on, on a thread of its own."""
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Waits until a receiver has accepted the hand-over.

        Raises:
            UnreachableError: none did in time; the client goes on trying.
        """
        if not self._ready.wait(timeout_s):
            raise UnreachableError(
                f"no receiver at {self.path} accepted the hand-over within {timeout_s:g} s",
                f"start one: farfault receive --attach {self.path}",
            )

    def vcpu(self, number: int) -> VcpuLink:
        """The calling thread's channel for the vCPU it runs; the receiver learns of both."""
        link = VcpuLink(self, number)
        with self._lock:
            self._links[number] = link
            if self._ready.is_set():
                self._announce(link)
        return link

    def wake(self, vcpu: int) -> None:
        """A kick: the vCPU, if it waits for a verdict, asks its `kicked` at once. From any thread."""
        link = self._links.get(vcpu)
        if link is not None:
            link.wake()

    def close(self) -> None:
        """Ends the connection and stops watching: what is absent then reads as zero. The guest must have stopped."""
        self._closing.set()
        with self._lock:
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            self._thread.join()
        self._close_uffds()
        for link in self._links.values():
            link.close()
        self.state.close()
        os.close(self._state_descriptor)

    # ---- the client's thread -------------------------------------------------------------------

    def _main(self) -> None:
        told = False
        while not self._closing.is_set():
            pause_s, connected = self._attempt(told=told)
            told = told or not connected
            if self.released.is_set():
                break
            self._closing.wait(pause_s)
        if self.released.is_set():
            self._close_uffds()  # every range is unregistered: nothing waits on these any more
            for link in list(self._links.values()):
                link.wake()
            self._on_released()

    def _attempt(self, *, told: bool) -> tuple[float, bool]:
        """One connection. Returns how long to wait before the next, and whether there was one."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(str(self.path))
                _send_descriptors(connection, self._handover.pack(), self._descriptors)
            except OSError as error:
                if not told:
                    logger.info("waiting for a receiver at %s: %s", self.path, error.strerror)
                return RETRY_S, False
            with self._lock:
                if self._closing.is_set():
                    return 0.0, True
                self._connection = connection
            try:
                return self._follow(connection), True
            finally:
                with self._lock:
                    self._connection = None
                    self._ready.clear()

    def _follow(self, connection: socket.socket) -> float:
        """Obeys frames until the connection ends. Returns how long to wait before the next attempt."""
        while True:
            try:
                frame_type, payload = _receive_frame(connection)
            except (OSError, ProtocolError) as error:
                if not self._closing.is_set():
                    logger.warning(
                        "the receiver is gone (%s); the guest waits for missing pages until it is back", error
                    )
                return RETRY_S
            match frame_type:
                case FrameType.READY:
                    with self._lock:
                        self._ready.set()
                        for link in self._links.values():
                            self._announce(link)
                case FrameType.RELEASED:
                    self.released.set()
                    return 0.0
                case FrameType.REFUSED:
                    logger.error("the receiver refused this VM: %s", payload.decode(errors="replace"))
                    return REFUSED_RETRY_S
                case _:
                    logger.error("frame type %d from the receiver", frame_type)
                    return REFUSED_RETRY_S

    def _announce(self, link: VcpuLink) -> None:
        """Gives a vCPU a fresh channel; the caller holds the lock."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = FRAME.pack(FrameType.VCPU, VCPU_HELLO.size) + VCPU_HELLO.pack(link.number, link.thread_id)
            try:
                assert self._connection is not None
                _send_descriptors(self._connection, message, [theirs.fileno()])
            except OSError as error:
                logger.warning("vCPU %d cannot be announced: %s", link.number, error.strerror)
        link.take(ours)

    def _close_uffds(self) -> None:
        for uffd in self._uffds.values():
            uffd.close()
        self._uffds = {}


class VcpuLink:
    """One vCPU's questions to the receiver; made by `AttachClient.vcpu`, used by the thread that made it."""

    def __init__(self, client: AttachClient, number: int) -> None:
        self.number = number
        self.thread_id = threading.get_native_id()
        self._client = client
        self._sequence = 0
        self._channel: socket.socket | None = None
        self._fresh: socket.socket | None = None
        self._fresh_lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._released_gpa = -1
        self._released_retries = 0
        self._counters = VcpuCounters(0, 0, 0, 0, 0, 0, 0, self.thread_id, 0)
        self._count()

    def ask(self, report: Report, kicked: Callable[[], bool]) -> Verdict | None:
        """Reports and waits for the verdict, for as long as it takes.

        Args:
            report: of an exit, or a START; its `seq` is filled in here.
            kicked: asked at least every 20 ms, and at once after `AttachClient.wake`.

        Returns:
            The verdict; after the release RETRY, or COMPLETE for an MMIO exit, or PASS for an exit that comes
            again and again. None: a kick came.
        """
        self._sequence = (self._sequence + 1) & 0xFFFF_FFFF
        report = report._replace(seq=self._sequence)
        began_ns = time.monotonic_ns()
        self._count(waiting=1)
        self._send(report)
        verdict = self._wait(report, kicked)
        blocked_ns = self._counters.blocked_ns + time.monotonic_ns() - began_ns
        self._count(waiting=0, blocked_ns=blocked_ns, kicks=self._counters.kicks + (verdict is None))
        return verdict

    def count_exit(self, report: Report) -> None:
        """Counts an exit for the receiver's statistics."""
        counters = self._counters
        if report.ret == 0:
            self._count(exits_mmio=counters.exits_mmio + 1)
        else:
            self._count(
                exits_annotated=counters.exits_annotated + (report.exit_reason != 0),
                exits_bare=counters.exits_bare + (report.exit_reason == 0),
                lost_samples=counters.lost_samples + (report.address_source is AddressSource.NONE),
            )

    def count_passed(self) -> None:
        """Counts an exit that the VMM had to take itself."""
        self._count(passed=self._counters.passed + 1)

    def take(self, channel: socket.socket) -> None:
        """From the client's thread: a fresh channel, which replaces the old one."""
        channel.setblocking(False)
        with self._fresh_lock:
            unused, self._fresh = self._fresh, channel
        if unused is not None:
            unused.close()
        self.wake()

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        for channel in (self._fresh, self._channel):
            if channel is not None:
                channel.close()
        self._fresh = self._channel = None
        os.close(self._wake)

    def _wait(self, report: Report, kicked: Callable[[], bool]) -> Verdict | None:
        while True:
            self._drain_wake()
            with self._fresh_lock:
                fresh, self._fresh = self._fresh, None
            if fresh is not None:
                self._drop_channel()
                self._channel = fresh
                self._send(report)
            verdict = self._read(report.seq)
            if verdict is not None:
                return verdict
            if self._client.released.is_set():
                return Verdict(report.seq, self._after_release(report))
            if kicked():
                return None
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            if self._channel is not None:
                poll.register(self._channel, select.POLLIN)
            poll.poll(WAIT_POLL_S * 1000)

    def _after_release(self, report: Report) -> VerdictKind:
        """All memory is there and nobody decides any more: what was under way is restarted, within a bound."""
        if report.ret == 0 and report.exit_reason == EXIT_MMIO:
            return VerdictKind.COMPLETE
        self._released_retries = self._released_retries + 1 if report.gpa == self._released_gpa else 1
        self._released_gpa = report.gpa
        if self._released_retries > RELEASED_RETRIES_MAX:
            self._released_retries = 0
            return VerdictKind.PASS
        return VerdictKind.RETRY

    def _send(self, report: Report) -> None:
        if self._channel is not None:
            try:
                self._channel.send(report.pack())
            except OSError:
                self._drop_channel()  # the receiver is gone; the next one brings a new channel

    def _read(self, sequence: int) -> Verdict | None:
        """The verdict for this report if it is there; stale ones are dropped."""
        while self._channel is not None:
            try:
                verdict = Verdict.unpack(self._channel.recv(VERDICT.size + 1))
            except BlockingIOError:
                return None
            except (OSError, ProtocolError):
                self._drop_channel()
                return None
            if verdict.seq == sequence:
                return verdict
        return None

    def _drop_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _count(self, **changes: int) -> None:
        self._counters = self._counters._replace(**changes)
        self._client.state.write_counters(self.number, self._counters)


def _regions(blocks: Sequence[RamBlock]) -> tuple[HandOverRegion, ...]:
    regions, offset = [], 0
    for block in blocks:
        regions.append(HandOverRegion(block.base_hva, block.alias_hva, block.size_bytes, offset, block.page_size_bytes))
        offset += block.size_bytes
    return tuple(regions)


def _watch(blocks: Sequence[RamBlock], fault_source: FaultSource) -> dict[str, Userfaultfd]:
    """The userfaultfds by their names in the hand-over; every block is registered."""
    if fault_source is FaultSource.SIMULATED:
        return {}
    made = {"uffd": Userfaultfd.create(FEATURE_THREAD_ID | FEATURE_EVENT_REMOVE)}
    try:
        if fault_source is FaultSource.STOCK_NOWAIT:
            made["alias_uffd"] = Userfaultfd.create(FEATURE_SIGBUS)
        for block in blocks:
            made["uffd"].register(block.base_hva, block.size_bytes)
            if "alias_uffd" in made:
                made["alias_uffd"].register(block.alias_hva, block.size_bytes)
    except BaseException:
        for uffd in made.values():
            uffd.close()
        raise
    return made


def _send_descriptors(connection: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    """One sendmsg; the rest, should the kernel take only a part, without them."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    sent = connection.sendmsg([data], [rights])
    if sent < len(data):
        connection.sendall(data[sent:])


def _receive_frame(connection: socket.socket) -> tuple[int, bytes]:
    frame_type, length = FRAME.unpack(_receive_all(connection, FRAME.size))
    if length > FRAME_BYTES_MAX:
        raise ProtocolError(f"a frame of {length} bytes")
    return frame_type, _receive_all(connection, length)


def _receive_all(connection: socket.socket, size_bytes: int) -> bytes:
    data = b""
    while len(data) < size_bytes:
        part = connection.recv(size_bytes - len(data))
        if not part:
            raise ProtocolError("connection closed")
        data += part
    return data
