"""The VMM on this host as a receiver controls it: over QMP, connected when it is first needed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from farfault_cli.errors import FarfaultError
from farfault_vmm.qmp import QmpVmm

logger = logging.getLogger(__name__)


class Destination:
    """The destination VMM.

    Args:
        qmp: its socket; None: there is no control of it, and only `close` may be called.
        kill: ends its process, if that is known.

    Attributes:
        vmm: None before `connect`, and after `discard`.
    """

    def __init__(self, qmp: Path | None, kill: Callable[[], None] = lambda: None) -> None:
        self._qmp = qmp
        self._kill = kill
        self.vmm: QmpVmm | None = None

    @property
    def is_controlled(self) -> bool:
        """False: memory only, nothing is stopped or started."""
        return self._qmp is not None

    async def connect(self) -> QmpVmm:
        """The VMM's control; connected at the first call.

        Raises:
            UnreachableError: it does not answer.
        """
        assert self._qmp is not None
        if self.vmm is None:
            self.vmm = await QmpVmm.connect(self._qmp)
        return self.vmm

    async def discard(self) -> None:
        """Half a VM is of no use; its VMM ends so that nobody runs it by mistake.

        One that does not obey is killed: a thread of it may sleep in the kernel for a page that will never come.
        """
        if self.vmm is None:
            return
        try:
            await self.vmm.quit()
        except FarfaultError as error:
            logger.warning("the destination VMM does not end: %s; it is killed", error.problem)
            self._kill()
        self.vmm = None

    async def close(self) -> None:
        """Ends the control; the VMM stays as it is."""
        if self.vmm is not None:
            await self.vmm.close()
