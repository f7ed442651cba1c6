"""Child processes of a demo, a test or a benchmark: started with a log file each, ended with their owner."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from farfault_cli.errors import FarfaultError

POLL_S = 0.01
END_TIMEOUT_S = 10.0
LOG_TAIL_LINES = 15


def end_on_sigterm() -> None:
    """SIGTERM ends this process as an exception would, so that VMs and namespaces end and their RAM is freed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Processes:
    """A set of named child processes. Use as a context manager: leaving it ends them all.

    Args:
        folder: for their logs, ``NAME.log``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in reversed(list(self._running)):
            self.end(name)

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a child; output of both kinds goes to its log."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - one system call, and no thread holds a lock
            )
        self._running[name] = process
        return process

    def farfault(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts a `farfault` command of this interpreter."""
        return self.start(name, farfault_argv(*arguments), env)

    def log(self, name: str) -> Path:
        """A child's log file."""
        return self.folder / f"{name}.log"

    def tail(self, name: str) -> str:
        """The last lines of a child's log."""
        lines = self.log(name).read_text(errors="replace").splitlines() if self.log(name).exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = 30.0, *needs: str) -> None:
        """Polls until the condition is true.

        Args:
            condition: whether what is awaited has come.
            what: it, for the message.
            timeout_s: the bound.
            needs: children that must live meanwhile.

        Raises:
            FarfaultError: it did not come, or a child ended; with that child's last words.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            for name in needs:
                code = self._running[name].poll()
                if code is not None and not condition():
                    raise FarfaultError(f"{name} ended with exit code {code} before {what}:\n{self.tail(name)}")
            if time.monotonic() > deadline:
                logs = "".join(f"\n--- {name}\n{self.tail(name)}" for name in self._running)
                raise FarfaultError(f"{what}: not within {timeout_s:g} s{logs}")
            time.sleep(POLL_S)

    def wait(self, name: str, timeout_s: float) -> int:
        """Waits for a child's end; returns its exit code.

        Raises:
            FarfaultError: it does not end.
        """
        try:
            return self._running[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise FarfaultError(f"{name} does not end within {timeout_s:g} s:\n{self.tail(name)}") from None

    def names(self) -> list[str]:
        """Children that were started and not ended."""
        return list(self._running)

    def is_running(self, name: str) -> bool:
        """Has a child that was started not ended by itself?"""
        return self._running[name].poll() is None

    def exit_code(self, name: str) -> int | None:
        """How a child ended; None: it lives. Negative: by that signal."""
        return self._running[name].poll()

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def kill(self, name: str) -> None:
        """SIGKILL, and reaps."""
        self._running[name].kill()
        self._running.pop(name).wait(END_TIMEOUT_S)

    def end(self, name: str) -> None:
        """SIGTERM, after a while SIGKILL; reaps."""
        process = self._running.pop(name)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


_libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """prctl(2): a demo or a test that is killed leaves no VM behind. It holds across exec."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def farfault_argv(*arguments: str) -> list[str]:
    """The command line of a `farfault` command of this interpreter."""
    return [sys.executable, "-m", "farfault_cli", *arguments]
