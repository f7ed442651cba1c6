"""Saving and loading the device state over a stream socket, on a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from farfault_cli.errors import FarfaultError

from farfault_shim.refvmm.machine import ReferenceVm, RunState
from farfault_shim.refvmm.saved_state import STATE_BYTES_MAX, SavedState, SavedStateError

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
STREAM_TIMEOUT_S: Final = 60.0
"""Without a byte going either way."""
END_TIMEOUT_S: Final = 1.0
CHUNK_BYTES: Final = 1 << 16
UNDER_WAY: Final = frozenset({"setup", "active", "cancelling"})


class MigrationError(FarfaultError):
    """The device state cannot go or come."""


class Migration:
    """The one migration of a VM; `status` has QMP's names.

    Args:
        vm: that moves.
        on_status: called with each new status, on the thread that changes it.
    """

    def __init__(self, vm: ReferenceVm, on_status: Callable[[str], None]) -> None:
        self.status = ""
        self.error = ""
        self._vm = vm
        self._on_status = on_status
        self._lock = threading.Lock()
        self._stream: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def describe(self) -> dict[str, Any]:
        """The answer to ``query-migrate``."""
        error = {"error-desc": self.error} if self.error else {}
        return {"status": self.status} | error if self.status else {}

    def send(self, open_stream: Callable[[], socket.socket]) -> None:
        """Saves the VM and sends its state; returns at once.

        Raises:
            MigrationError: one is under way.
        """
        self._begin(open_stream, self._save)

    def receive(self, open_stream: Callable[[], socket.socket]) -> None:
        """Reads a state and loads it; returns at once.

        Raises:
            MigrationError: one is under way, or the VM does not wait for a state.
        """
        if self._vm.run_state is not RunState.INMIGRATE:
            raise MigrationError("this VM does not wait for a state", "start it with --incoming defer")
        self._begin(open_stream, self._load)

    def cancel(self) -> None:
        """Ends what is under way; nothing where nothing is."""
        with self._lock:
            if self.status not in UNDER_WAY:
                return
            self._set("cancelling")
            if self._stream is not None:
                with contextlib.suppress(OSError):
                    self._stream.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cancels and waits for the thread; not for one that still waits for its peer to connect."""
        self.cancel()
        if self._thread is not None:
            self._thread.join(END_TIMEOUT_S)

    def _begin(self, open_stream: Callable[[], socket.socket], work: Callable[[socket.socket], None]) -> None:
        with self._lock:
            if self.status in UNDER_WAY:
                raise MigrationError(f"a migration is under way: {self.status}")
            self.error = ""
            self._set("setup")
            self._thread = threading.Thread(target=self._main, args=(open_stream, work), name="migration", daemon=True)
            self._thread.start()

    def _main(self, open_stream: Callable[[], socket.socket], work: Callable[[socket.socket], None]) -> None:
        was_running = self._vm.run_state is RunState.RUNNING
        problem = ""
        try:
            with open_stream() as stream:
                with self._lock:
                    if self.status == "cancelling":
                        raise MigrationError("cancelled")
                    self._stream = stream
                    self._set("active")
                stream.settimeout(STREAM_TIMEOUT_S)
                work(stream)
        except (OSError, FarfaultError) as error:
            problem = str(error)
        with self._lock:
            self._stream = None
            if not problem:
                self._set("completed")
                return
            cancelled = self.status == "cancelling"
            self.error = "" if cancelled else problem
            if not cancelled:
                logger.error("the device state did not go through: %s", problem)
        if was_running:
            with contextlib.suppress(FarfaultError):
                self._vm.resume()
        with self._lock:
            self._set("cancelled" if cancelled else "failed")

    def _save(self, stream: socket.socket) -> None:
        data = self._vm.save().pack()
        stream.sendall(data)
        with self._lock:
            if self.status == "cancelling":
                raise MigrationError("cancelled")
            self._vm.saved()

    def _load(self, stream: socket.socket) -> None:
        data = b""
        while chunk := stream.recv(CHUNK_BYTES):
            data += chunk
            if len(data) > STATE_BYTES_MAX:
                raise SavedStateError(f"a device state of more than {STATE_BYTES_MAX} bytes")
        self._vm.load(SavedState.unpack(data))

    def _set(self, status: str) -> None:
        """The caller holds the lock."""
        self.status = status
        self._on_status(status)


def opener_of(uri: str, descriptors: dict[str, int], *, incoming: bool) -> Callable[[], socket.socket]:
    """What opens the stream of a URI.

    Args:
        uri: ``fd:NAME`` or ``unix:PATH``.
        descriptors: by the names of ``getfd``; the one that is used is taken out.
        incoming: listen on the path instead of connecting to it.

    Raises:
        MigrationError: another kind of URI, or no such descriptor.
    """
    kind, _, name = uri.partition(":")
    if kind == "fd" and name in descriptors:
        stream = socket.socket(fileno=descriptors.pop(name))
        return lambda: stream
    if kind == "fd":
        raise MigrationError(f"no descriptor named {name!r} was passed by getfd")
    if kind != "unix" or not name:
        raise MigrationError(f"migration URI {uri!r} is neither fd:NAME nor unix:PATH")
    if incoming:
        listening = _listen(Path(name))
        return lambda: _accept(listening, Path(name))
    return lambda: _connect(name)


def _connect(path: str) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(CONNECT_TIMEOUT_S)
        stream.connect(path)
    except OSError as error:
        stream.close()
        raise MigrationError(f"{path}: {error.strerror}", "is the destination in migrate-incoming?") from error
    return stream


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listening.bind(os.fspath(path))
        listening.listen(1)
        listening.settimeout(STREAM_TIMEOUT_S)
    except OSError as error:
        listening.close()
        raise MigrationError(f"{path}: {error.strerror}") from error
    return listening


def _accept(listening: socket.socket, path: Path) -> socket.socket:
    try:
        stream, _ = listening.accept()
        return stream
    finally:
        listening.close()
        path.unlink(missing_ok=True)
