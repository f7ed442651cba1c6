"""The reference VM as a whole: memory, vCPUs, run states, and its device state."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from enum import Enum
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_shim.attach.wire import PARAVIRTUAL_MSRS
from farfault_shim.kvm.abi import MSR_TSC
from farfault_shim.kvm.interface import MemoryRegion, Vcpu, Vm
from farfault_shim.kvm.registers import Registers
from farfault_shim.refvmm.boot import set_first_registers
from farfault_shim.refvmm.gate import RunGate
from farfault_shim.refvmm.memory import GuestMemory
from farfault_shim.refvmm.saved_state import SavedState, VcpuState
from farfault_shim.refvmm.vcpu_thread import FarFaults, VcpuThread

logger = logging.getLogger(__name__)

VCPUS_MAX: Final = 64
SAVED_MSRS: Final = (MSR_TSC, *PARAVIRTUAL_MSRS)


class RunState(Enum):
    """QMP's names."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    POSTMIGRATE = "postmigrate"
    INTERNAL_ERROR = "internal-error"


class WrongStateError(FarfaultError):
    """The command does not fit the VM's run state."""


class ReferenceVm:
    """A VM and its threads. Owns `vm` and `memory`; methods may be called from any thread but a vCPU's.

    Args:
        vm: of either KVM, without memory or vCPUs.
        memory: of the guest; the boot code is in it unless a state will be loaded.
        vcpus: 1 to 64.
        kvmclock: turned on before the first run; a loaded state brings its own.
        incoming: the VM waits for a state.
        make_far_faults: see `VcpuThread`.
        wake: makes a vCPU that waits for a page look at its kick.
        on_event: called with the QMP events STOP and RESUME.
    """

    def __init__(
        self,
        vm: Vm,
        memory: GuestMemory,
        vcpus: int,
        *,
        kvmclock: bool,
        incoming: bool = False,
        make_far_faults: Callable[[Vcpu], FarFaults | None] | None = None,
        wake: Callable[[int], None] = lambda vcpu: None,
        on_event: Callable[[str], None] = lambda name: None,
    ) -> None:
        assert 1 <= vcpus <= VCPUS_MAX
        self.memory = memory
        self._vm = vm
        self._wake = wake
        self._on_event = on_event
        self._lock = threading.RLock()
        self._gate = RunGate(vcpus)
        self._clock_ns: int | None = None
        self._failure = ""
        self._state = RunState.INMIGRATE if incoming else RunState.PRELAUNCH
        for slot, place in enumerate(memory.places):
            vm.set_memory_region(MemoryRegion(slot, 0, place.gpa, place.size_bytes, memory.for_kvm.hva + place.offset))
        self._vcpus = [vm.create_vcpu(number) for number in range(vcpus)]
        if not incoming:
            for vcpu in self._vcpus:
                set_first_registers(vcpu, kvmclock=kvmclock)
        self._threads = [VcpuThread(vcpu, self._gate, make_far_faults, self._failed) for vcpu in self._vcpus]
        for thread in self._threads:
            thread.start()

    @property
    def kind(self) -> str:
        """Of KVM: ``kvm`` or ``simulated``."""
        return self._vm.kind

    @property
    def vcpus(self) -> int:
        return len(self._vcpus)

    @property
    def run_state(self) -> RunState:
        return RunState.INTERNAL_ERROR if self._failure else self._state

    @property
    def failure(self) -> str:
        """Why the VM is in INTERNAL_ERROR."""
        return self._failure

    def resume(self) -> None:
        """Lets the guest run.

        Raises:
            WrongStateError: no state was loaded yet, or a vCPU cannot go on.
        """
        with self._lock:
            if self.run_state is RunState.RUNNING:
                return
            if self.run_state in (RunState.INMIGRATE, RunState.INTERNAL_ERROR):
                raise WrongStateError(f"the VM cannot run: it is in state {self.run_state.value}", self._failure)
            if self._clock_ns is not None:
                self._vm.set_clock_ns(self._clock_ns)
            self._state = RunState.RUNNING
            self._on_event("RESUME")
            self._gate.open()

    def pause(self) -> None:
        """Returns when no vCPU runs.

        Raises:
            StuckError: a vCPU does not stop.
        """
        with self._lock:
            if self._state is not RunState.RUNNING:
                return
            self._gate.shut(self._kick)
            self._clock_ns = self._vm.get_clock_ns()
            self._state = RunState.PAUSED
            self._on_event("STOP")

    def save(self) -> SavedState:
        """Pauses, and gives the device state.

        Raises:
            WrongStateError: there is no state yet, or the VM has failed.
        """
        with self._lock:
            self.pause()
            if self.run_state in (RunState.INMIGRATE, RunState.INTERNAL_ERROR):
                raise WrongStateError(f"nothing can be saved in state {self.run_state.value}", self._failure)
            vcpus = tuple(
                VcpuState(
                    vcpu.get_registers().pack(),
                    vcpu.get_special(),
                    vcpu.get_xsave(),
                    vcpu.get_msrs(SAVED_MSRS),
                )
                for vcpu in self._vcpus
            )
            clock_ns = self._vm.get_clock_ns() if self._clock_ns is None else self._clock_ns
            return SavedState(self.kind, self.memory.machine.value, self.memory.size_bytes, clock_ns, vcpus)

    def saved(self) -> None:
        """The state that `save` gave has reached its receiver."""
        with self._lock:
            if self._state is RunState.PAUSED:
                self._state = RunState.POSTMIGRATE

    def load(self, state: SavedState) -> None:
        """Takes a device state; the VM is paused then.

        Raises:
            SavedStateError: of another kind of VM.
            WrongStateError: the VM did not wait for one.
        """
        with self._lock:
            if self.run_state is not RunState.INMIGRATE:
                raise WrongStateError("a state loads only into a VM that was started with --incoming defer")
            state.check_fits(self.kind, self.memory.machine.value, self.memory.size_bytes, self.vcpus)
            self._vm.set_clock_ns(state.clock_ns)
            for vcpu, saved in zip(self._vcpus, state.vcpus, strict=True):
                vcpu.set_special(saved.special)
                vcpu.set_registers(Registers.unpack(saved.registers))
                vcpu.set_xsave(saved.xsave)
                vcpu.set_msrs(saved.msrs)
            self._clock_ns = state.clock_ns
            self._state = RunState.PAUSED

    def close(self) -> None:
        """Stops the guest and ends the threads; the RAM file stays.

        Raises:
            StuckError: a vCPU does not stop; its thread and memory stay.
        """
        with self._lock:
            self._gate.shut(self._kick, for_ever=True)
            for thread in self._threads:
                thread.join()
            for vcpu in self._vcpus:
                vcpu.close()
            self._vm.close()
            self.memory.close()

    def _kick(self, number: int) -> None:
        self._vcpus[number].kick()
        self._wake(number)

    def _failed(self, problem: str) -> None:
        """On the failed vCPU's thread."""
        logger.error("%s", problem)
        self._failure = self._failure or problem
        self._gate.shut_soon(self._kick)
