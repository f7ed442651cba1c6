"""When pages came to each VM, seen from outside: tmpfs counts a file's blocks, and each page installed is some.

A look is one fstat a VM: it wakes no receiver, so that one that is not scheduled for a second is seen as what it is.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Final, Self

LOOK_EVERY_S: Final = 0.01
ARRIVALS_MAX: Final = 100_000
"""Moments kept for each VM."""


class Arrivals:
    """Looks at RAM files. Use as an async context manager: it looks until it is left.

    Args:
        rams: the destination VMs'.
    """

    def __init__(self, rams: Sequence[Path]) -> None:
        self.moments: list[list[float]] = [[] for _ in rams]
        """By VM: when there were more pages than at the look before; monotonic."""
        self.looked_every_s = 0.0
        """The longest time between two looks."""
        self._files = [os.open(ram, os.O_RDONLY | os.O_CLOEXEC) for ram in rams]
        self._blocks = [os.fstat(file).st_blocks for file in self._files]
        self._looked_at: float | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="arrivals")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        self.close()

    def close(self) -> None:
        """Closes the files; called by leaving the context."""
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

    async def _run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_EVERY_S)
