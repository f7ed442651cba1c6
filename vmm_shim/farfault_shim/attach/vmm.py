"""An attached VMM as its receiver sees it: memory, memslots, and a channel for each vCPU."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from farfault_shim.attach.state_area import StateArea
from farfault_shim.attach.wire import (
    FRAME,
    FRAME_BYTES_MAX,
    REPORT,
    VCPU_HELLO,
    VCPUS_MAX,
    FaultSource,
    FrameType,
    HandOver,
    ProtocolError,
    Report,
    Slot,
    VcpuCounters,
    VcpuHello,
    Verdict,
)
from farfault_shim.layout import Layout
from farfault_shim.uffd.userfaultfd import Userfaultfd

logger = logging.getLogger(__name__)


class VcpuChannel:
    """One vCPU's reports and verdicts.

    Args:
        vcpu: its number.
        connection: our end of its SOCK_SEQPACKET pair.
    """

    def __init__(self, vcpu: int, connection: socket.socket) -> None:
        self.vcpu = vcpu
        self._socket = connection
        self._socket.setblocking(False)

    def start(self, on_report: Callable[[VcpuChannel, Report], None]) -> None:
        """Reports arrive from now on, on the event loop."""
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read, on_report)

    def send_verdict(self, verdict: Verdict) -> None:
        """Answers a report. A vCPU that has gone or does not listen is logged, never waited for."""
        try:
            self._socket.send(verdict.pack())
        except OSError as error:
            logger.warning("vCPU %d does not take its verdict: %s", self.vcpu, error)

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()

    def _read(self, on_report: Callable[[VcpuChannel, Report], None]) -> None:
        """One report a wake-up: a vCPU has one outstanding, and the loop calls again for a stale one before it."""
        try:
            data = self._socket.recv(REPORT.size + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            report = Report.unpack(data)
            if report.vcpu != self.vcpu:
                raise ProtocolError(f"a report of vCPU {report.vcpu} on the channel of {self.vcpu}")
        except ProtocolError as error:
            logger.error("vCPU %d: %s; its channel is closed", self.vcpu, error)
            self.close()
            return
        on_report(self, report)


class AttachedVmm:
    """A VMM that handed its memory over. Owns all descriptors that came with it.

    Args:
        connection: the attach socket.
        handover: what it said.
        descriptors: the received descriptors, in the order of ``handover.descriptors``.
        pid, uid: of the peer, from SO_PEERCRED.

    Raises:
        ProtocolError: descriptors are missing or are not what their names say.
    """

    def __init__(
        self, connection: socket.socket, handover: HandOver, descriptors: list[int], pid: int, uid: int
    ) -> None:
        if len(descriptors) != len(handover.descriptors):
            raise ProtocolError(f"{len(descriptors)} descriptors instead of {len(handover.descriptors)}")
        named = dict(zip(handover.descriptors, descriptors, strict=True))
        self.handover = handover
        self.layout: Layout = handover.layout()
        self.pid = pid
        self.uid = uid
        self._socket = connection
        self._buffer = bytearray()
        self._channels: list[VcpuChannel] = []
        self._on_report: Callable[[VcpuChannel, Report], None] | None = None
        try:
            self.uffd = Userfaultfd(named["uffd"]) if "uffd" in named else None
            self.alias_uffd = Userfaultfd(named["alias_uffd"]) if "alias_uffd" in named else None
            ram = [named[f"ram{index}"] for index in range(len(handover.regions))] if not handover.is_plain else []
            state = StateArea(named["state"]) if "state" in named else None
        except (ValueError, KeyError) as error:
            raise ProtocolError(f"hand-over without a good descriptor: {error}") from error
        if self.uffd is None and handover.fault_source is not FaultSource.SIMULATED:
            raise ProtocolError("hand-over without a userfaultfd")
        self.ram_fds: list[int] = ram
        self._state = state
        if self.uffd is not None:
            os.set_blocking(self.uffd.fileno(), False)
        self._descriptors = [number for name, number in named.items() if name not in ("uffd", "alias_uffd")]

    @property
    def fault_source(self) -> FaultSource:
        return self.handover.fault_source

    def slots(self) -> list[Slot]:
        """The memslots of this moment; none known of a plain Firecracker peer."""
        return self._state.slots() if self._state is not None else []

    def counters(self) -> dict[int, VcpuCounters]:
        """The shim's counters by vCPU."""
        return self._state.vcpus() if self._state is not None else {}

    def vcpu_tids(self) -> dict[int, int]:
        """Thread id to vCPU."""
        return {counters.thread_id: vcpu for vcpu, counters in self.counters().items()}

    def start(self, on_report: Callable[[VcpuChannel, Report], None]) -> None:
        """Accepts the hand-over: vCPUs announce themselves and their reports arrive from now on.

        Threads that sleep on missing pages fault again: an earlier receiver may have read their faults and died.
        """
        self._on_report = on_report
        if self.uffd is not None:
            for region in self.handover.regions:
                self.uffd.wake(region.base_hva, region.size_bytes)
        for channel in self._channels:
            channel.start(on_report)
        self._send(FrameType.READY)

    def refuse(self, reason: str) -> None:
        """Turns the hand-over down; the VMM logs the reason and tries again later."""
        self._send(FrameType.REFUSED, reason.encode()[:FRAME_BYTES_MAX])

    def release(self) -> None:
        """All memory is installed: the VMM may forget the receiver."""
        self._send(FrameType.RELEASED)

    def close(self) -> None:
        """Closes every descriptor of ours; the VMM keeps its own duplicates, so the guest waits."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        for descriptor in (self.uffd, self.alias_uffd):
            if descriptor is not None:
                descriptor.close()
        for number in self._descriptors:
            os.close(number)
        self._descriptors = []
        if self._state is not None:
            self._state.close()
            self._state = None
        self._socket.close()

    def received(self, data: bytes, descriptors: list[int]) -> None:
        """Bytes and descriptors from the attach socket.

        Raises:
            ProtocolError: not a frame that a VMM may send; the descriptors are closed.
        """
        self._buffer += data
        try:
            while len(self._buffer) >= FRAME.size:
                frame_type, length = FRAME.unpack_from(self._buffer)
                if length > FRAME_BYTES_MAX or frame_type != FrameType.VCPU or length != VCPU_HELLO.size:
                    raise ProtocolError(f"frame type {frame_type} of {length} bytes from a VMM")
                if len(self._buffer) < FRAME.size + length:
                    return
                hello = VcpuHello(*VCPU_HELLO.unpack_from(self._buffer, FRAME.size))
                del self._buffer[: FRAME.size + length]
                if hello.vcpu >= VCPUS_MAX or not descriptors:
                    raise ProtocolError(f"vCPU {hello.vcpu} announced with {len(descriptors)} descriptors")
                self._add_vcpu(hello, _as_socket(descriptors.pop(0)))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _add_vcpu(self, hello: VcpuHello, connection: socket.socket) -> None:
        for channel in [old for old in self._channels if old.vcpu == hello.vcpu]:
            channel.close()
            self._channels.remove(channel)
        channel = VcpuChannel(hello.vcpu, connection)
        self._channels.append(channel)
        if self._on_report is not None:
            channel.start(self._on_report)

    def _send(self, frame_type: FrameType, payload: bytes = b"") -> None:
        if self.handover.is_plain:
            return
        try:
            self._socket.send(FRAME.pack(frame_type, len(payload)) + payload)
        except OSError as error:
            logger.warning("VMM %d does not take frame %s: %s", self.pid, frame_type.name, error)


def _as_socket(descriptor: int) -> socket.socket:
    try:
        return socket.socket(fileno=descriptor)
    except OSError as error:
        os.close(descriptor)
        raise ProtocolError(f"a vCPU announced with a descriptor that is no socket: {error.strerror}") from error
