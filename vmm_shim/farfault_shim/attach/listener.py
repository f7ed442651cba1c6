"""The unix socket on which VMMs attach."""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Self

from farfault_cli.errors import UsageError

from farfault_shim.attach.vmm import AttachedVmm
from farfault_shim.attach.wire import (
    FRAME,
    HANDOVER_BYTES_MAX,
    REGIONS_MAX,
    FrameType,
    HandOver,
    ProtocolError,
)
from farfault_shim.unix_path import check_socket_path

logger = logging.getLogger(__name__)

DESCRIPTORS_MAX: Final = REGIONS_MAX + 3
PEERS_MAX: Final = 16
"""Connections at one time that have not handed over yet, and VMMs."""
HANDOVER_TIMEOUT_S: Final = 5.0


class AttachListener:
    """Accepts VMMs on a unix socket. Make one with `start`."""

    def __init__(
        self,
        path: Path,
        listening: socket.socket,
        on_attached: Callable[[AttachedVmm], None],
        on_detached: Callable[[AttachedVmm], None],
        allowed_uids: Collection[int],
    ) -> None:
        self.path = path
        self._socket = listening
        self._on_attached = on_attached
        self._on_detached = on_detached
        self._allowed_uids = frozenset(allowed_uids)
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(
        cls,
        path: Path,
        on_attached: Callable[[AttachedVmm], None],
        on_detached: Callable[[AttachedVmm], None],
        allowed_uids: Collection[int] = (),
    ) -> Self:
        """Listens. A stale socket file is replaced, a live one is not.

        Args:
            path: of the socket, at most `UNIX_PATH_BYTES_MAX` bytes.
            on_attached: a VMM handed its memory over; it answers with ``vmm.start`` or ``vmm.refuse``.
            on_detached: its connection ended.
            allowed_uids: users whose processes may attach, besides our own and root.

        Raises:
            UsageError: the path cannot be listened on.
        """
        check_socket_path(path, "choose a shorter --attach")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale(path)
            listening.bind(str(path))
            path.chmod(0o600 if not allowed_uids else 0o666)  # SO_PEERCRED decides
            listening.listen(PEERS_MAX)
        except OSError as error:
            listening.close()
            raise UsageError(
                f"cannot listen on {path}: {error.strerror}",
                "its folder must exist and be writable, and no other receiver may use it",
            ) from error
        listening.setblocking(False)
        listener = cls(path, listening, on_attached, on_detached, {0, os.geteuid(), *allowed_uids})
        listener._spawn(listener._accept())
        return listener

    async def close(self) -> None:
        """Ends listening and all connections; the socket file is removed."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._socket.close()
        self.path.unlink(missing_ok=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._socket)
            if len(self._tasks) > PEERS_MAX:
                connection.close()
                continue
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        pid, uid, _ = struct.unpack(
            "iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        )
        descriptors: list[int] = []
        vmm: AttachedVmm | None = None
        try:
            if uid not in self._allowed_uids:
                raise ProtocolError(f"user {uid} may not attach; start the receiver with --allow-uid {uid}")
            async with asyncio.timeout(HANDOVER_TIMEOUT_S):
                handover = await _receive_handover(connection, descriptors)
            vmm = AttachedVmm(connection, handover, descriptors, pid, uid)
            descriptors = []
            self._on_attached(vmm)
            await _follow(connection, vmm)
        except (ProtocolError, TimeoutError) as error:
            reason = str(error) or f"no hand-over within {HANDOVER_TIMEOUT_S:g} s"
            logger.error("VMM with pid %d refused: %s", pid, reason)
            with contextlib.suppress(OSError):
                connection.send(FRAME.pack(FrameType.REFUSED, len(reason.encode())) + reason.encode())
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            if vmm is not None:
                self._on_detached(vmm)
                vmm.close()
            connection.close()

    def _spawn(self, coroutine: object) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _receive_handover(connection: socket.socket, descriptors: list[int]) -> HandOver:
    """Reads until the JSON array is whole; descriptors are appended as they come, the caller owns them."""
    text = b""
    while len(text) <= HANDOVER_BYTES_MAX:
        data = await _receive(connection, descriptors)
        if not data:
            raise ProtocolError("the connection ended before the hand-over")
        text += data
        if text.rstrip().endswith(b"]") and _is_whole(text):
            return HandOver.parse(text)
    raise ProtocolError(f"a hand-over longer than {HANDOVER_BYTES_MAX} bytes")


def _is_whole(text: bytes) -> bool:
    """False while a JSON array is still open: the end of an inner one may look like its own."""
    return text.count(b"[") <= text.count(b"]")


async def _follow(connection: socket.socket, vmm: AttachedVmm) -> None:
    """Passes frames on until the VMM goes."""
    while True:
        descriptors: list[int] = []
        try:
            data = await _receive(connection, descriptors)
        except OSError:
            return
        except ProtocolError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        if not data:
            return
        vmm.received(data, descriptors)


async def _receive(connection: socket.socket, descriptors: list[int]) -> bytes:
    """One recvmsg, waiting for data."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, ancillary, flags, _ = connection.recvmsg(
                HANDOVER_BYTES_MAX, socket.CMSG_SPACE(4 * DESCRIPTORS_MAX), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            readable = loop.create_future()
            loop.add_reader(connection.fileno(), _set_once, readable)
            try:
                await readable
            finally:
                loop.remove_reader(connection.fileno())
            continue
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
                descriptors.extend(numbers)
        if flags & socket.MSG_CTRUNC or len(descriptors) > DESCRIPTORS_MAX:
            raise ProtocolError(f"more than {DESCRIPTORS_MAX} descriptors")
        return data


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _remove_stale(path: Path) -> None:
    """Removes a socket file that nobody listens on. Raises FileExistsError for anything else."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise FileExistsError(17, "a file that is no socket is in the way")
    except FileNotFoundError:
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(str(path))
    except ConnectionRefusedError:
        path.unlink()
    else:
        raise FileExistsError(98, "another process listens on it")
    finally:
        probe.close()
