"""When pages came to each VM, seen from outside: tmpfs counts a file's blocks, and each page installed is some.

A look is one fstat a VM: it wakes no receiver, so that one that is not scheduled for a second is seen as what it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Final, Self

from farfault_cli.runtime import be_urgent

LOOK_EVERY_S: Final = 0.01
ARRIVALS_MAX: Final = 100_000
"""Moments kept for each VM."""


class Arrivals:
    """Looks at RAM files in a thread of its own, from entering this context manager until leaving it.

    Args:
        rams: the destination VMs'.
    """

    def __init__(self, rams: Sequence[Path]) -> None:
        self.moments: list[list[float]] = [[] for _ in rams]
        """By VM: when there were more pages than before; monotonic, nearly in order."""
        self.looked_every_s = 0.0
        """The longest time between two looks."""
        self._files = [os.open(ram, os.O_RDONLY | os.O_CLOEXEC) for ram in rams]
        self._blocks = [os.fstat(file).st_blocks for file in self._files]
        self._looked_at: float | None = None
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="arrivals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()
        for file in self._files:
            os.close(file)

    def note(self, vm: int) -> None:
        """The receiver told of progress; the only sign of pages that are zero, which take no memory."""
        if len(self.moments[vm]) < ARRIVALS_MAX:
            self.moments[vm].append(monotonic())

    def look(self) -> None:
        """Once."""
        now = monotonic()
        if self._looked_at is not None:
            self.looked_every_s = max(self.looked_every_s, now - self._looked_at)
        self._looked_at = now
        for vm, file in enumerate(self._files):
            blocks = os.fstat(file).st_blocks
            if blocks != self._blocks[vm]:
                self._blocks[vm] = blocks
                self.note(vm)

    def _run(self) -> None:
        be_urgent()  # this thread alone; among hundreds of processes it would look seldom
        while not self._left.wait(LOOK_EVERY_S):
            self.look()
