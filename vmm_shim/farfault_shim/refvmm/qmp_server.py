"""QMP on a unix socket: one client at a time, commands in their order, events from any thread."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from farfault_cli.errors import UsageError

from farfault_shim.refvmm import qmp
from farfault_shim.unix_path import check_socket_path

logger = logging.getLogger(__name__)

RECEIVE_BYTES: Final = 1 << 16
DESCRIPTORS_PER_MESSAGE_MAX: Final = 4
SEND_TIMEOUT_S: Final = 5.0
"""A client that does not read for so long is dropped."""


class QmpServer:
    """Listens; `serve_once` does the work.

    Args:
        path: of the socket; one that is there is replaced, and it appears only when a client can connect.

    Raises:
        UsageError: the path cannot be listened on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._client: socket.socket | None = None
        self._reader = qmp.RequestReader()
        self._send_lock = threading.Lock()
        hidden = path.with_name(f"{path.name}.{os.getpid()}")
        check_socket_path(hidden, "choose a shorter --qmp")
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listening.bind(os.fspath(hidden))
            hidden.chmod(0o600)
            self._listening.listen(1)
            hidden.replace(path)
        except OSError as error:
            self._listening.close()
            raise UsageError(f"cannot listen on {path}: {error.strerror}", "choose another --qmp") from error

    def fileno(self) -> int:
        """Of what is worth waiting for: the client, or the next one."""
        return (self._client or self._listening).fileno()

    def serve_once(self, run: Callable[[qmp.Request], bytes], passed: Callable[[list[int]], None]) -> None:
        """Call it when `fileno` is readable.

        Args:
            run: a command to its reply.
            passed: descriptors that came along.
        """
        client = self._client
        if client is None:
            self._accept()
            return
        try:
            data, ancillary, _, _ = client.recvmsg(
                RECEIVE_BYTES, socket.CMSG_SPACE(4 * DESCRIPTORS_PER_MESSAGE_MAX), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, ancillary = b"", []
        if not data:
            self._drop()
            return
        passed(_descriptors_of(ancillary))
        for request in self._reader.received(data):
            self._send(run(request))

    def emit(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Sends an event to the client, if there is one. From any thread."""
        self._send(qmp.event(name, data))

    def wait(self, wake_descriptor: int, timeout_s: float | None) -> bool:
        """Waits for the socket or a wake, for ever where no time is given. True: the socket has something."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        poll.register(wake_descriptor, select.POLLIN)
        return any(
            descriptor == self.fileno() for descriptor, _ in poll.poll(None if timeout_s is None else timeout_s * 1000)
        )

    def close(self) -> None:
        self._drop()
        self._listening.close()
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        client, _ = self._listening.accept()
        client.settimeout(SEND_TIMEOUT_S)
        self._reader = qmp.RequestReader()
        with self._send_lock:
            self._client = client
        self._send(qmp.greeting())

    def _send(self, message: bytes) -> None:
        with self._send_lock:
            if self._client is None:
                return
            try:
                self._client.sendall(message)
            except OSError as error:
                logger.warning("the QMP client does not take messages: %s", error)
                with contextlib.suppress(OSError):
                    self._client.shutdown(socket.SHUT_RDWR)  # serve_once sees the end and drops it

    def _drop(self) -> None:
        with self._send_lock:
            if self._client is not None:
                self._client.close()
                self._client = None


def _descriptors_of(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    numbers = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(payload[: len(payload) - len(payload) % numbers.itemsize])
    return list(numbers)
