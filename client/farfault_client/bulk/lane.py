"""The receiver's end of the bulk process: a `LaneDriver` for the background lane."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

from farfault_client.bulk.messages import (
    DESCRIPTORS_MAX,
    MESSAGE_BYTES_MAX,
    REQUEST_HEAD,
    Connect,
    MessageType,
    Target,
    unpack_placed,
)
from farfault_client.bulk.shared_pages import SharedPages
from farfault_client.session.answers import BadAnswerError
from farfault_client.session.frames import FRAME_SLACK_BYTES
from farfault_client.session.lane import Lane, LaneLostError, LaneStats, LaneUser
from farfault_client.session.lease import Lease, Peer

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 30.0
"""For the bulk process to start and to connect; its own attempts end within less."""
REPORTS_PER_WAKEUP_MAX = 8
"""Answers that are accounted for before the event loop looks at faults again: about 50 us each."""


class BulkHost:
    """Owns the bulk process; starts it at first use and again after its death.

    Args:
        shared: what the process sees of our pages' states; stays its owner's.
        page_count: of the guest.
        batch_bytes_max: the most page data that an answer of the page server may have.
    """

    def __init__(self, shared: SharedPages, page_count: int, batch_bytes_max: int) -> None:
        self._shared = shared
        self._page_count = page_count
        self._frame_bytes_max = batch_bytes_max + FRAME_SLACK_BYTES
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._target: Target | None = None
        self._descriptors: Sequence[int] = ()

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def connection(self) -> socket.socket:
        """The socket to a living bulk process."""
        if self._socket is None or self.pid is None:
            self._start()
        assert self._socket is not None
        return self._socket

    def place_into(self, target: Target | None, descriptors: Sequence[int] = ()) -> None:
        """The memory that pages go into from now on; None: nobody's, they are thrown away.

        Args:
            target: where it is.
            descriptors: as it names them. They stay the caller's, and open until the next call.
        """
        if len(descriptors) > DESCRIPTORS_MAX:
            raise ValueError(f"{len(descriptors)} memory regions, more than {DESCRIPTORS_MAX}")
        self._target, self._descriptors = target, descriptors
        if self._socket is not None:
            self._send_target(self._socket)

    def close(self) -> None:
        """Ends the process."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        if self._socket is not None:
            self._socket.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        shared = self._shared.fileno()
        arguments = [theirs.fileno(), shared, self._page_count, self._frame_bytes_max]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "farfault_client.bulk.process", *map(str, arguments)],
            pass_fds=[theirs.fileno(), shared],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._socket = ours
        if self._target is not None:
            self._send_target(ours)
        logger.debug("bulk process %d started", self._process.pid)

    def _send_target(self, connection: socket.socket) -> None:
        packet = self._target.pack() if self._target is not None else bytes([MessageType.TARGET])
        try:
            socket.send_fds(connection, [packet], self._descriptors)
        except OSError as error:  # it is gone, or stuck behind a full socket: the next one is told
            logger.warning("bulk process: %s; it is started again", error)
            self.close()


class ProcessLane:
    """A `LaneDriver` whose connection lives in the bulk process.

    Args:
        host: of the process.
        peer: the page server's address for the background lane.
        lease: whose pages.
        user: see `LaneUser`.
        stats: counted into.
        streams: parallel streams over gRPC; 0: frames on a plain stream.
        on_ready: called when the process is connected. Nothing is asked for before that, as a page that is called in
            flight must be on its way.
    """

    def __init__(
        self,
        host: BulkHost,
        peer: Peer,
        lease: Lease,
        user: LaneUser,
        stats: LaneStats,
        *,
        streams: int,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.carrier = "process" if streams else "express process"
        self._lease = lease
        self._user = user
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._host = host
        self._on_ready = on_ready
        self._connected: asyncio.Future[None] = self._loop.create_future()
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

    @property
    def is_ready(self) -> bool:
        return self._connected.done()

    def pump(self) -> None:
        while self.is_ready and not self._blocked and (request := self._user.next_request(Lane.BACKGROUND)) is not None:
            head = bytes([MessageType.REQUEST]) + REQUEST_HEAD.pack(self._lease.generation)
            self._send(head + request.SerializeToString())

    async def run(self) -> None:
        await asyncio.wait({self._connected, self._ended}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not self._connected.done() and not self._ended.done():
            self._host.close()
            raise LaneLostError(f"the bulk process did not connect in {READY_TIMEOUT_S:g} s")
        await self._ended

    async def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())

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
        for _ in range(REPORTS_PER_WAKEUP_MAX):
            try:
                packet = self._socket.recv(MESSAGE_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._end(LaneLostError("the bulk process is gone"))
                return
            if packet[0] == MessageType.PLACED:
                wire_bytes, placed = unpack_placed(packet)
                self._stats.wire_bytes += wire_bytes
                self._stats.answers += 1
                self._user.placed(Lane.BACKGROUND, placed)
            elif packet[0] == MessageType.CONNECTED:
                if not self._connected.done():
                    self._connected.set_result(None)
                    self._on_ready()
                    self.pump()
            elif packet[0] == MessageType.LOST:
                text = packet[2:].decode(errors="replace")
                self._end(BadAnswerError(text) if packet[1] else LaneLostError(text))
                return

    def _end(self, error: Exception) -> None:
        if not self._ended.done():
            self._loop.remove_reader(self._socket.fileno())
            self._ended.set_exception(error)
