"""Which pages the guest gave back, kept over the receiver's own death.

The kernel remembers which pages are in memory, but not why the others are not: without this a page that a balloon
took would be fetched from the source again. Records are appended before they are acted on; they outlive the process,
not the host, and neither does the VM.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

from farfault_shim.layout import PageIndex, PageRun

_RECORD = struct.Struct("<QQ")
RECORDS_MAX = 16 << 20
"""256 MiB of records: a log that grows beyond is not written any further, and pages may be fetched again."""


class RemovedLog:
    """Runs of pages in the order in which they were removed. A page may have come back since.

    Args:
        path: of the file, made at the first record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def append(self, run: PageRun) -> None:
        """Adds a run."""
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
        if os.fstat(self._descriptor).st_size < RECORDS_MAX * _RECORD.size:
            os.write(self._descriptor, _RECORD.pack(*run))

    def runs(self, page_count: int) -> Iterator[PageRun]:
        """What an earlier receiver has written; records that cannot be of this VM end it."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        whole = len(data) - len(data) % _RECORD.size  # the last one may have been cut
        for first, count in _RECORD.iter_unpack(data[:whole]):
            if count == 0 or first + count > page_count:
                return
            yield PageRun(PageIndex(first), count)

    def forget(self) -> None:
        """The move is over."""
        self.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
