"""The receiver's end of the bulk process: a `LaneDriver` for the background lane."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from typing import Any

from farfault.codec import DecodedBatch
from farfault.v1 import pages_pb2 as pb

from farfault_client.bulk.messages import (
    ANSWER_HEAD,
    MESSAGE_BYTES_MAX,
    NO_SLOT,
    REQUEST_HEAD,
    SLOT,
    Connect,
    MessageType,
)
from farfault_client.bulk.ring import SlotRing, make_memory
from farfault_client.session.answers import BadAnswerError, verify
from farfault_client.session.frames import FRAME_SLACK_BYTES
from farfault_client.session.lane import Lane, LaneLostError, LaneStats, LaneUser
from farfault_client.session.lease import Lease, Peer

logger = logging.getLogger(__name__)

ANSWERS_PER_WAKEUP_MAX = 2
"""Answers installed before the event loop looks at faults again: about 0.1 ms each."""


class BulkHost:
    """Owns the bulk process; starts it at first use and again after its death.

    Args:
        slot_bytes: the most page data that an answer of the page server may have.
    """

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes = slot_bytes + FRAME_SLACK_BYTES
        memory = make_memory(slot_bytes)
        self.ring = SlotRing(memory, slot_bytes)
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def connection(self) -> socket.socket:
        """The socket to a living bulk process."""
        if self._socket is None or self._process is None or self._process.poll() is not None:
            self._start()
        assert self._socket is not None
        return self._socket

    def end_process(self) -> None:
        """Ends the process; the next `connection` is to a fresh one, to which every slot is free."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Ends the process and frees the ring."""
        self.end_process()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _start(self) -> None:
        if self._socket is not None:
            self._socket.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        arguments = [theirs.fileno(), self._memory, self._slot_bytes]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "farfault_client.bulk.process", *map(str, arguments)],
            pass_fds=[theirs.fileno(), self._memory],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._socket = ours
        logger.debug("bulk process %d started", self._process.pid)


class ProcessLane:
    """A `LaneDriver` whose connection lives in the bulk process.

    Args:
        host: of the process.
        peer: the page server's address for the background lane.
        lease: whose pages.
        user: see `LaneUser`.
        stats: counted into.
        streams: parallel streams over gRPC; 0: frames on a plain stream.
    """

    def __init__(
        self, host: BulkHost, peer: Peer, lease: Lease, user: LaneUser, stats: LaneStats, *, streams: int
    ) -> None:
        self.carrier = "process" if streams else "express process"
        self._freed: list[int] = []
        self._host = host
        self._lease = lease
        self._user = user
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._socket = host.connection()
        self._blocked: list[bytes] = []
        self._loop.add_reader(self._socket.fileno(), self._readable)
        connect = Connect(
            peer.target,
            not streams,
            str(peer.tls or ""),
            lease.lease_id,
            lease.token,
            lease.generation,
            [(region.size_bytes, region.page_size_bytes) for region in lease.layout.regions],
            streams,
        )
        self._send(connect.pack())

    def pump(self) -> None:
        while not self._blocked and (request := self._user.next_request(Lane.BACKGROUND)) is not None:
            head = bytes([MessageType.REQUEST]) + REQUEST_HEAD.pack(self._lease.generation)
            self._send(head + request.SerializeToString())

    async def run(self) -> None:
        await self._ended

    async def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        if self._blocked:  # slots that it would never hear are free
            self._host.end_process()

    def _send(self, packet: bytes) -> None:
        try:
            self._socket.send(packet)
        except BlockingIOError:
            self._blocked.append(packet)
            self._loop.add_writer(self._socket.fileno(), self._writable)
        except OSError as error:
            self._end(LaneLostError(f"the bulk process is gone: {error}"))

    def _writable(self) -> None:
        self._loop.remove_writer(self._socket.fileno())
        blocked, self._blocked = self._blocked, []
        for packet in blocked:
            self._send(packet)
        self.pump()

    def _readable(self) -> None:
        try:
            self._take_answers()
        finally:
            self._free()

    def _take_answers(self) -> None:
        for _ in range(ANSWERS_PER_WAKEUP_MAX):
            try:
                packet = self._socket.recv(MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._end(LaneLostError("the bulk process is gone"))
                return
            if packet[0] == MessageType.ANSWER:
                self._answer(packet)
            elif packet[0] == MessageType.LOST:
                text = packet[2:].decode(errors="replace")
                self._end(BadAnswerError(text) if packet[1] else LaneLostError(text))
                return

    def _answer(self, packet: bytes) -> None:
        slot, offset, length, wire_bytes = ANSWER_HEAD.unpack_from(packet, 1)
        self._stats.wire_bytes += wire_bytes
        header = pb.PageBatch.FromString(packet[1 + ANSWER_HEAD.size :])
        data: Any = b"" if slot == NO_SLOT else self._host.ring.slot(slot)
        try:
            batch = DecodedBatch(header, data, offset, length)
            answer = verify(batch, self._lease.layout, self._lease.generation, data_checked=True)
            self._stats.answers += 1
            self._user.answered(Lane.BACKGROUND, answer)
        except BadAnswerError as error:
            self._end(error)
        finally:
            if slot != NO_SLOT:
                self._freed.append(slot)

    def _free(self) -> None:
        """Gives slots back, several in one packet: each packet may wake the other process."""
        if self._freed:
            self._send(bytes([MessageType.FREE]) + b"".join(map(SLOT.pack, self._freed)))
            self._freed.clear()

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._loop.remove_reader(self._socket.fileno())
            self._ended.set_exception(error)
