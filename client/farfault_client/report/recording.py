"""Keeps a record of a running receiver in a file."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import UsageError

from farfault_client.receive.journal import Step
from farfault_client.receive.receiver import Receiver
from farfault_client.report.recorder import Line, Recorder

logger = logging.getLogger(__name__)

FLUSH_AFTER_S: Final = 1.0
"""A receiver that is killed loses at most the samples of this time."""


async def start_recording(receiver: Receiver, path: Path) -> Callable[[], Awaitable[None]]:
    """Records from now on: a new move begins the file anew, one that is taken up goes on in it.

    Returns:
        How to end that, which writes the footer.

    Raises:
        UsageError: the file cannot be written.
    """
    record = receiver.journal.record
    is_new = record is None or record.step is Step.OPENED
    try:
        file = path.open("w" if is_new else "a", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"cannot write the record {path}: {error.strerror}", "name another file with --record"
        ) from error
    recording = _Recording(receiver, file)
    task = asyncio.get_running_loop().create_task(recording.run(), name="record")

    async def end() -> None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        recording.end()

    return end


class _Recording(logging.Handler):
    """Also takes the warnings and errors of this package's log as events."""

    def __init__(self, receiver: Receiver, file: TextIO) -> None:
        super().__init__(logging.WARNING)
        self._receiver = receiver
        self._file: TextIO | None = file
        self._flushed_at = time.monotonic()
        self._recorder = Recorder(receiver, self._flushed_at)
        self._write([self._recorder.header()])
        logging.getLogger("farfault_client").addHandler(self)

    async def run(self) -> None:
        """Samples from the moment on in which the move begins."""
        while True:
            changed = self._receiver.changed
            self._write(self._recorder.changes(time.monotonic()))
            if self._receiver.progress.phase == rpb.PHASE_WAITING:
                await changed.wait()
                continue
            self._write([self._recorder.sample(time.monotonic())])
            try:
                async with asyncio.timeout(self._recorder.interval_s):
                    await changed.wait()
            except TimeoutError:
                continue

    def emit(self, record: logging.LogRecord) -> None:
        self._write(self._recorder.event(time.monotonic(), record.levelname.lower(), record.getMessage()))

    def end(self) -> None:
        logging.getLogger("farfault_client").removeHandler(self)
        now, self._flushed_at = time.monotonic(), float("-inf")
        self._write([*self._recorder.changes(now), self._recorder.sample(now), self._recorder.footer(now)])
        if self._file is not None:
            self._file.close()

    def _write(self, lines: Iterable[Line]) -> None:
        """A disk that is full ends the record, never the move."""
        if self._file is None:
            return
        try:
            for line in lines:
                self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            if time.monotonic() - self._flushed_at > FLUSH_AFTER_S:
                self._file.flush()
                self._flushed_at = time.monotonic()
        except OSError as error:
            file, self._file = self._file, None
            logger.warning("the record ends here: %s", error.strerror)
            with suppress(OSError):  # what is buffered cannot be written either
                file.close()
