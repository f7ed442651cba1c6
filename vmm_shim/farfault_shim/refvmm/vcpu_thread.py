"""The loop around KVM_RUN, the same for the real and the simulated KVM."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from farfault_shim.kvm.abi import EXIT_MMIO
from farfault_shim.kvm.interface import RunResult, Vcpu
from farfault_shim.refvmm.gate import RunGate

logger = logging.getLogger(__name__)


class Next(Enum):
    """What a vCPU does after an exit."""

    RUN = "run again"
    PASS = "the VMM handles the exit itself"
    KICKED = "look at the gate"


class FarFaults(Protocol):
    """Takes the exits that may be far faults (`far_faults.FarFaultReporter`)."""

    def prepare(self) -> Next:
        """Before KVM_RUN. RUN: go on; KICKED: come back later."""

    def settle(self, result: RunResult) -> Next:
        """After KVM_RUN."""


class VcpuThread:
    """Runs one vCPU until the gate closes for ever.

    Args:
        vcpu: to run; closed by the owner after the thread has ended.
        gate: of the VM.
        make_far_faults: called on the thread itself; None where no memory is far.
        on_failure: called on the thread with a log line when the vCPU cannot go on.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        gate: RunGate,
        make_far_faults: Callable[[Vcpu], FarFaults | None] | None,
        on_failure: Callable[[str], None],
    ) -> None:
        self.vcpu = vcpu
        self._gate = gate
        self._make_far_faults = make_far_faults
        self._on_failure = on_failure
        self._mmio_unfinished = False
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Waits for the thread's end; the gate must be closed for ever."""
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _main(self) -> None:
        try:
            far_faults = self._make_far_faults(self.vcpu) if self._make_far_faults is not None else None
            problem = ""
        except Exception as error:
            problem = f"vCPU {self.vcpu.number} cannot be watched: {error}"
        while self._gate.pass_through(self.vcpu):
            try:
                problem = problem or self._run(far_faults)
            except Exception:
                logger.exception("vCPU %d", self.vcpu.number)
                problem = f"vCPU {self.vcpu.number}: an error of the VMM itself"
            if problem:
                self._on_failure(problem)

    def _run(self, far_faults: FarFaults | None) -> str:
        """Runs until a kick. Returns why the vCPU cannot go on, or nothing."""
        area = self.vcpu.area
        while True:
            if far_faults is not None and far_faults.prepare() is Next.KICKED:
                return ""
            if self._mmio_unfinished:
                result = RunResult(0, 0)  # its verdict is still owed; KVM must not run before
            else:
                area.exit_reason = 0
                result = self.vcpu.run()
            action = Next.PASS if far_faults is None else far_faults.settle(result)
            self._mmio_unfinished = action is Next.KICKED and result.ret == 0
            if action is Next.KICKED:
                return ""
            if action is Next.RUN:
                continue
            if result.ret < 0 and result.err in (errno.EINTR, errno.EAGAIN):
                if area.immediate_exit:
                    return ""
                continue
            if result.ret == 0 and area.exit_reason == EXIT_MMIO:
                self._device_access()
                continue
            return self._describe(result)

    def _device_access(self) -> None:
        """There are no devices: reads give ones, writes go nowhere, as on an empty bus."""
        access = self.vcpu.area.mmio
        logger.debug("vCPU %d: access to %#x, where no device is", self.vcpu.number, access.gpa)
        if not access.is_write:
            self.vcpu.area.answer_mmio(b"\xff" * len(access.data))

    def _describe(self, result: RunResult) -> str:
        error = f"errno {errno.errorcode.get(result.err, result.err)}" if result.ret else "an exit"
        rip = self.vcpu.get_registers().rip
        return (
            f"vCPU {self.vcpu.number}: KVM_RUN ended with {error}, exit_reason {self.vcpu.area.exit_reason}, "
            f"rip {rip:#x}; the VM is stopped"
        )
