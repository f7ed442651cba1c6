"""A KVM in Python for machines without /dev/kvm, and for tests: same interface, same struct kvm_run, same errno.

Its vCPUs run one program, the self-verifying worker (`simulated_worker`), on a RAM file. A page is present
when the file has data at its offset; an access to another one ends KVM_RUN as the `FaultProfile` and the
NOWAIT interfaces say. Whatever is random comes from one seed, a generator for each vCPU.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Mapping, Sequence
from typing import Final

from farfault_shim.guest.addresses import WORKER
from farfault_shim.kvm import abi
from farfault_shim.kvm.fault_profile import PLAIN, FaultProfile
from farfault_shim.kvm.interface import MemoryRegion, RunResult
from farfault_shim.kvm.nowait import NowaitInterface
from farfault_shim.kvm.registers import Registers
from farfault_shim.kvm.run_area import MemoryFault, Mmio, RunArea
from farfault_shim.kvm.simulated_memory import (
    PAGE_BYTES,
    SLOTS_MAX,
    Backing,
    PageFault,
    SimulatedMemory,
    SimulatedSlot,
)
from farfault_shim.kvm.simulated_worker import PVCLOCK, SimulatedWorker

RUN_BYTES: Final = 4096
VCPUS_MAX: Final = 1024
STEPS_BEFORE_YIELD: Final = 256
"""Steps of a guest between two moments at which other Python threads get their turn."""
DEVICE_GPA: Final = 0xFEB0_0000
NO_SLOT_GPA: Final = 1 << 51
GARBAGE_BYTES: Final = 64

_SUCCESS: Final = RunResult(0, 0)
_EFAULT: Final = RunResult(-1, errno.EFAULT)
_EHWPOISON: Final = RunResult(-1, abi.EHWPOISON)
_EXTENSIONS: Final = {
    abi.CAP_USER_MEMORY: 1,
    abi.CAP_NR_VCPUS: VCPUS_MAX,
    abi.CAP_MAX_VCPUS: VCPUS_MAX,
    abi.CAP_NR_MEMSLOTS: SLOTS_MAX,
    abi.CAP_XSAVE: 1,
    abi.CAP_READONLY_MEM: 1,
    abi.CAP_IMMEDIATE_EXIT: 1,
    abi.CAP_USER_MEMORY2: 1,
    abi.CAP_MEMORY_FAULT_INFO: 1,
}
_ONE_TO_ONE_MULTIPLIER: Final = 1 << 31
_ONE_TO_ONE_SHIFT: Final = 1


class SimulatedVm:
    """A VM of the simulated KVM.

    Args:
        backings: the mapped RAM files that memslots may point into; the descriptors are duplicated.
        seed: of everything random.
        profile: how often it misbehaves, and how.
        interfaces: NOWAIT interfaces that it has.
        watched: see `SimulatedMemory`; `release` ends it.
    """

    kind: Final = "simulated"

    def __init__(
        self,
        backings: Sequence[Backing],
        *,
        seed: int = 0,
        profile: FaultProfile = PLAIN,
        interfaces: Sequence[NowaitInterface] = (),
        watched: bool = True,
    ) -> None:
        self.memory = SimulatedMemory(backings, interfaces, watched=watched)
        self.profile = profile
        self._seed = seed
        self._interfaces = tuple(interfaces)
        self._vcpus: list[SimulatedVcpu] = []
        self.clock_base_ns = 0

    def check_extension(self, capability: int) -> int:
        if any(interface.capability == capability for interface in self._interfaces):
            return 1
        return _EXTENSIONS.get(capability, 0)

    def enable_capability(self, capability: int, argument: int = 0) -> None:
        needs_info = any(interface.needs_info_enabled for interface in self._interfaces)
        if capability != abi.CAP_MEMORY_FAULT_INFO or not needs_info or argument != 1:
            raise OSError(errno.EINVAL, f"capability {capability} is not turned on this way")
        self.memory.info_enabled = True

    def set_memory_region(self, region: MemoryRegion) -> None:
        old_slots = self.memory.slots
        self.memory.set_region(region)
        for vcpu in self._vcpus:
            vcpu.slots_changed(old_slots)

    def create_vcpu(self, number: int) -> SimulatedVcpu:
        if not 0 <= number < VCPUS_MAX:
            raise OSError(errno.EINVAL, f"vCPU {number}")
        if any(vcpu.number == number for vcpu in self._vcpus):
            raise OSError(errno.EEXIST, f"vCPU {number}")
        vcpu = SimulatedVcpu(self, number, random.Random(f"{self._seed}/{number}"))
        self._vcpus.append(vcpu)
        return vcpu

    def get_clock_ns(self) -> int:
        return self.clock_base_ns + max((vcpu.ticks for vcpu in self._vcpus), default=0)

    def set_clock_ns(self, clock_ns: int) -> None:
        self.clock_base_ns = clock_ns - max((vcpu.ticks for vcpu in self._vcpus), default=0)
        for vcpu in self._vcpus:
            vcpu.clock_changed()

    def release(self) -> None:
        """Nobody watches the memory any more: what is absent reads as zero."""
        self.memory.watched = False

    def close(self) -> None:
        self.memory.close()


class SimulatedVcpu:
    """A vCPU of the simulated KVM; made by `SimulatedVm.create_vcpu`.

    Attributes:
        sampled_gva: what a tracepoint would have recorded at the last fault; None: nothing since it was taken.
        skipped_clock_updates: times that KVM could not write the kvmclock page, silently, as the kernel does.
    """

    def __init__(self, vm: SimulatedVm, number: int, rng: random.Random) -> None:
        self.number = number
        self.area = RunArea(bytearray(RUN_BYTES))
        self.sampled_gva: int | None = None
        self.skipped_clock_updates = 0
        self._vm = vm
        self._memory = vm.memory
        self._rng = rng
        self._worker = SimulatedWorker(self)
        self._special = bytes(abi.SREGS_BYTES)
        self._xsave = bytes(abi.XSAVE_BYTES)
        self._msrs: dict[int, int] = {abi.MSR_KVM_SYSTEM_TIME_NEW: 0}
        self._clock_due = False
        self._old_slots: tuple[SimulatedSlot, ...] | None = None
        self._last_annotated_gpa = WORKER & -PAGE_BYTES
        self._undisturbed_gpa = -1
        self._emulated: PageFault | None = None
        self._completed: tuple[int, bool, int] | None = None

    @property
    def ticks(self) -> int:
        """The time stamp counter."""
        return self._worker.ticks

    # ---- the interface Vcpu ------------------------------------------------------------------------

    def run(self) -> RunResult:
        self._complete_mmio()
        if self.area.immediate_exit:
            return RunResult(-1, errno.EINTR)
        profile = self._vm.profile
        if profile.interrupted and self._rng.random() < profile.interrupted:
            return RunResult(-1, errno.EINTR)
        if profile.again and self._rng.random() < profile.again:
            return RunResult(-1, errno.EAGAIN)
        if not self._worker.can_run:
            self.area.exit_reason = abi.EXIT_SHUTDOWN
            return _SUCCESS
        self._update_clock()
        try:
            self._worker.begin()
            while True:
                for _ in range(STEPS_BEFORE_YIELD):
                    if self.area.immediate_exit:
                        return RunResult(-1, errno.EINTR)
                    self._worker.step()
                time.sleep(0)
        except PageFault as fault:
            return self._exit_of(fault)
        except _Disturbance as disturbance:
            return disturbance.result

    def kick(self) -> None:
        self.area.immediate_exit = True

    def get_registers(self) -> Registers:
        return self._worker.registers

    def set_registers(self, registers: Registers) -> None:
        self._worker.registers = registers

    def get_special(self) -> bytes:
        return self._special

    def set_special(self, special: bytes) -> None:
        assert len(special) == abi.SREGS_BYTES
        self._special = special

    def get_xsave(self) -> bytes:
        return self._xsave

    def set_xsave(self, xsave: bytes) -> None:
        assert len(xsave) == abi.XSAVE_BYTES
        self._xsave = xsave

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        known = {abi.MSR_TSC: self._worker.ticks, **self._msrs}
        return {index: known[index] for index in indices if index in known}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        for index, value in values.items():
            if index == abi.MSR_TSC:
                self._worker.ticks = value
            elif index in self._msrs:
                self._msrs[index] = value
            else:
                raise OSError(errno.EINVAL, f"MSR {index:#x}")
        self.clock_changed()

    def translate(self, gva: int) -> int | None:
        """The worker's map is one to one."""
        return gva if self._memory.find(gva, self._memory.slots) is not None else None

    def close(self) -> None:
        """Nothing to give back."""

    # ---- the worker's memory ---------------------------------------------------------------------

    def access(self, gpa: int, *, is_write: bool = False, value: int = 0) -> int:
        if self._completed is not None:
            done_gpa, done_write, done_value = self._completed
            if (done_gpa, done_write) == (gpa, is_write):
                self._completed = None
                return done_value
        if self._vm.profile.disturbs_accesses:
            self._disturb(gpa)
        memory, offset = self._memory.reach(gpa, self._take_slots(), is_write=is_write, value=value)
        if is_write:
            memory[offset : offset + 8] = value.to_bytes(8, "little")
            return value
        return int.from_bytes(memory[offset : offset + 8], "little")

    def fetch(self, gpa: int) -> None:
        self._memory.reach(gpa, self._take_slots(), is_write=False, is_fetch=True)

    def load_bytes(self, gpa: int, size_bytes: int) -> bytes:
        slot = self._memory.find(gpa, self._memory.slots)
        assert slot is not None
        assert slot.file is not None
        offset = slot.file_offset + gpa - slot.region.gpa
        return slot.file.memory[offset : offset + size_bytes]

    def store(self, gpa: int, value: int) -> None:
        self._memory.write(gpa, value.to_bytes(8, "little"))

    # ---- told by the VM ----------------------------------------------------------------------------

    def slots_changed(self, old_slots: tuple[SimulatedSlot, ...]) -> None:
        """The memslots are others now; a vCPU may hold the old ones for one more access."""
        self._old_slots = old_slots

    def clock_changed(self) -> None:
        """The kvmclock page is out of date."""
        self._clock_due = True

    # ---- exits -------------------------------------------------------------------------------------

    def _exit_of(self, fault: PageFault) -> RunResult:
        """Puts a fault into struct kvm_run, in one of the forms that kernels have for it."""
        profile, rng = self._vm.profile, self._rng
        self.sampled_gva = fault.gpa
        if fault.annotated is not None:
            return self._annotated(fault.gpa, fault.flags) if fault.annotated else self._bare()
        if not fault.is_fetch and profile.emulated and rng.random() < profile.emulated:
            return self._emulate(fault)
        if profile.stale and rng.random() < profile.stale:
            self._annotate(MemoryFault(0, self._last_annotated_gpa, PAGE_BYTES))
            return _EFAULT
        if profile.bare and rng.random() < profile.bare:
            if profile.lost_sample and rng.random() < profile.lost_sample:
                self.sampled_gva = None
            return self._bare()
        return self._annotated(fault.gpa, fault.flags)

    def _annotated(self, gpa: int, flags: int = 0) -> RunResult:
        self._last_annotated_gpa = gpa & -PAGE_BYTES
        self._annotate(MemoryFault(flags, self._last_annotated_gpa, PAGE_BYTES))
        return _EFAULT

    def _annotate(self, fault: MemoryFault) -> None:
        self.area.exit_reason = abi.EXIT_MEMORY_FAULT
        self.area.memory_fault = fault

    def _bare(self) -> RunResult:
        self.area.fill_union(self._rng.randbytes(GARBAGE_BYTES))
        return _EFAULT

    def _emulate(self, fault: PageFault) -> RunResult:
        self._emulated = fault
        data = fault.value.to_bytes(8, "little") if fault.is_write else bytes(8)
        self.area.mmio = Mmio(fault.gpa, data, 8, fault.is_write)
        self.area.exit_reason = abi.EXIT_MMIO
        return _SUCCESS

    def _complete_mmio(self) -> None:
        """KVM_RUN after KVM_EXIT_MMIO takes the VMM's answer, even if it then returns at once."""
        fault, self._emulated = self._emulated, None
        if fault is not None:
            answer = int.from_bytes(self.area.mmio.data, "little")
            self._completed = (fault.gpa, fault.is_write, fault.value if fault.is_write else answer)

    def _disturb(self, gpa: int) -> None:
        """Raises an exit that the access did not deserve; never twice in a row for one access."""
        if gpa == self._undisturbed_gpa:
            self._undisturbed_gpa = -1
            return
        kind = self._draw_disturbance()
        if kind:
            self._undisturbed_gpa = gpa
            raise _Disturbance(self._disturbance(kind, gpa))

    def _draw_disturbance(self) -> str:
        profile, draw = self._vm.profile, self._rng.random()
        for kind in ("lost_race", "foreign", "poisoned", "device"):
            draw -= getattr(profile, kind)
            if draw < 0:
                return kind
        return ""

    def _disturbance(self, kind: str, gpa: int) -> RunResult:
        match kind:
            case "lost_race":
                return self._annotated(gpa)
            case "foreign":
                return self._foreign()
            case "poisoned":
                return self._poisoned(gpa)
            case _:
                return self._device()

    def _foreign(self) -> RunResult:
        slot = self._rng.choice(self._memory.slots)
        faults = (
            MemoryFault(abi.MEMORY_EXIT_FLAG_PRIVATE, slot.region.gpa, PAGE_BYTES),
            MemoryFault(0, NO_SLOT_GPA, PAGE_BYTES),
            MemoryFault(0, slot.region.gpa, 0),
            MemoryFault(0, slot.end - PAGE_BYTES, 2 * PAGE_BYTES),
        )
        self._annotate(self._rng.choice(faults))
        return _EFAULT

    def _poisoned(self, gpa: int) -> RunResult:
        self._annotated(gpa)
        return _EHWPOISON

    def _device(self) -> RunResult:
        self.area.mmio = Mmio(DEVICE_GPA, bytes(8), 4, is_write=False)
        self.area.exit_reason = abi.EXIT_MMIO
        return _SUCCESS

    # ---- what KVM does by itself ---------------------------------------------------------------------

    def _take_slots(self) -> tuple[SimulatedSlot, ...]:
        old, self._old_slots = self._old_slots, None
        if old is not None and self._rng.random() < self._vm.profile.old_slots:
            return old
        return self._memory.slots

    def _update_clock(self) -> None:
        address = self._msrs[abi.MSR_KVM_SYSTEM_TIME_NEW]
        if not self._clock_due or not address & 1:
            return
        self._clock_due = False
        address &= ~1
        if not self._memory.is_present(address):
            self.skipped_clock_updates += 1
            return
        version = PVCLOCK.unpack(self.load_bytes(address, PVCLOCK.size))[0]
        system_ns = self._vm.clock_base_ns + self.ticks
        fields = (version + 2 & ~1, 0, self.ticks, system_ns, _ONE_TO_ONE_MULTIPLIER, _ONE_TO_ONE_SHIFT, 1)
        self._memory.write(address, PVCLOCK.pack(*fields))


class SimulatedSampler:
    """What a tracepoint sampler is to a real vCPU: the address of the newest fault.

    Args:
        vcpu: whose faults are sampled.
    """

    def __init__(self, vcpu: SimulatedVcpu) -> None:
        self._vcpu = vcpu

    def newest(self) -> int | None:
        """The guest virtual address of the newest fault since the last call; None where there was none."""
        gva, self._vcpu.sampled_gva = self._vcpu.sampled_gva, None
        return gva

    def close(self) -> None:
        """Nothing to give back."""


class _Disturbance(Exception):  # noqa: N818 - not an error of this program
    """An exit that the guest's own access did not cause."""

    def __init__(self, result: RunResult) -> None:
        super().__init__()
        self.result = result
