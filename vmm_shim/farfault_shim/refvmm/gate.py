"""Start and stop of a VM's vCPU threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_shim.kvm.interface import Vcpu

STOP_TIMEOUT_S: Final = 30.0
KICK_INTERVAL_S: Final = 0.05
"""Between two kicks of a vCPU that does not stop."""


class StuckError(FarfaultError):
    """A vCPU does not leave KVM_RUN."""


class RunGate:
    """vCPU threads pass it to run and come back to it when they are kicked.

    Args:
        vcpus: number of vCPU threads that will come; all count as running until they have come once.
    """

    def __init__(self, vcpus: int) -> None:
        self._changed = threading.Condition()
        self._outside = set(range(vcpus))
        self._open = False
        self._closed_for_ever = False

    def pass_through(self, vcpu: Vcpu) -> bool:
        """On the vCPU's thread: waits until the gate is open. False: the VM ends."""
        with self._changed:
            self._outside.discard(vcpu.number)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._open or self._closed_for_ever)
            if self._closed_for_ever:
                return False
            self._outside.add(vcpu.number)
            vcpu.area.immediate_exit = False
            return True

    def open(self) -> None:
        """Lets all vCPUs run."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def shut_soon(self, kick: Callable[[int], None]) -> None:
        """Closes without waiting: from a vCPU's own thread."""
        with self._changed:
            self._open = False
            for number in self._outside:
                kick(number)

    def shut(self, kick: Callable[[int], None], *, for_ever: bool = False) -> None:
        """Returns when no vCPU runs.

        Args:
            kick: makes the vCPU of that number come back; from any thread, any number of times.
            for_ever: the threads end.

        Raises:
            StuckError: one did not come back within `STOP_TIMEOUT_S`.
        """
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        with self._changed:
            self._open = False
            self._closed_for_ever |= for_ever
            self._changed.notify_all()
            while self._outside:
                if time.monotonic() > deadline_s:
                    raise StuckError(
                        f"vCPUs {sorted(self._outside)} did not stop within {STOP_TIMEOUT_S:g} s",
                        "is the receiver alive? a vCPU that sleeps in the kernel waits for its page",
                    )
                for number in self._outside:
                    kick(number)
                self._changed.wait(KICK_INTERVAL_S)
