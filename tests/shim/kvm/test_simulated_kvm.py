"""The simulated KVM: every form of exit, every NOWAIT interface, and its guest."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Sequence

import pytest
from farfault_shim.guest import GuestParameters, read_mailboxes
from farfault_shim.guest.addresses import CLOCKS, MAILBOXES, PARAMETERS, WORKER
from farfault_shim.kvm import abi
from farfault_shim.kvm.fault_profile import PLAIN, FaultProfile
from farfault_shim.kvm.interface import MemoryRegion, RunResult
from farfault_shim.kvm.nowait import EXIT_ON_MISSING, NowaitInterface, NowaitSeries
from farfault_shim.kvm.registers import Registers
from farfault_shim.kvm.run_area import MemoryFault, Mmio, RunArea
from farfault_shim.kvm.simulated import DEVICE_GPA, NO_SLOT_GPA, SimulatedSampler, SimulatedVcpu, SimulatedVm
from farfault_shim.kvm.simulated_memory import Backing

PAGE = 4096
RAM_BYTES = 32 << 20
HVA = 0x7000_0000_0000
PARAMETERS_OF_GUEST = GuestParameters.for_ram(RAM_BYTES, pages_max=64, clock_interval_pages=4)
DATA = PARAMETERS_OF_GUEST.data_start
EFAULT = RunResult(-1, errno.EFAULT)

ABSENT_MAPPING_FAULT = NowaitInterface(NowaitSeries.ABSENT_MAPPING_FAULT, 226, 1 << 2)
NOWAIT_ON_FAULT = NowaitInterface(NowaitSeries.NOWAIT_ON_FAULT, 230, 1 << 2)
USERFAULT = NowaitInterface(NowaitSeries.USERFAULT, 241, 1 << 3)


class Machine:
    """A simulated VM of one vCPU, and the page installer of its tests."""

    def __init__(
        self,
        profile: FaultProfile = PLAIN,
        *,
        seed: int = 0,
        interfaces: Sequence[NowaitInterface] = (),
        flags: int = 0,
        bitmap_hva: int = 0,
        watched: bool = True,
    ) -> None:
        self.ram = os.memfd_create("ram")
        os.ftruncate(self.ram, RAM_BYTES)
        self.vm = SimulatedVm(
            [Backing(HVA, RAM_BYTES, self.ram)], seed=seed, profile=profile, interfaces=interfaces, watched=watched
        )
        self.vm.set_memory_region(MemoryRegion(0, flags, 0, RAM_BYTES, HVA, bitmap_hva))
        self.vcpu: SimulatedVcpu = self.vm.create_vcpu(0)
        self.vcpu.set_registers(Registers(rip=WORKER))

    def install(self, gpa: int) -> None:
        data = PARAMETERS_OF_GUEST.pack() if gpa & -PAGE == PARAMETERS else b""
        os.pwrite(self.ram, data.ljust(PAGE, b"\0"), gpa & -PAGE)

    def install_low(self) -> None:
        """All but the data pages."""
        for gpa in range(0, 0xA0000, PAGE):
            self.install(gpa)

    def install_data(self) -> None:
        for page in range(PARAMETERS_OF_GUEST.data_pages):
            self.install(PARAMETERS_OF_GUEST.address_of(page))

    def run(self) -> RunResult:
        self.vcpu.area.exit_reason = 0
        return self.vcpu.run()

    def run_until_kick(self, steps: int) -> None:
        """Lets the guest work for about so many steps with nothing absent."""
        worker, count = self.vcpu._worker, 0
        step = worker.step

        def counted() -> None:
            nonlocal count
            step()
            count += 1
            if count == steps:
                self.vcpu.kick()

        worker.step = counted  # type: ignore[method-assign]
        assert self.run() == RunResult(-1, errno.EINTR)
        self.vcpu.area.immediate_exit = False

    def close(self) -> None:
        self.vm.close()
        os.close(self.ram)


@pytest.fixture
def machines() -> Iterator[type[Machine]]:
    made: list[Machine] = []

    class Made(Machine):
        def __init__(self, *arguments: object, **settings: object) -> None:
            super().__init__(*arguments, **settings)  # type: ignore[arg-type]
            made.append(self)

    yield Made
    for machine in made:
        machine.close()


# ---- exits for absent pages --------------------------------------------------------------------------


def test_plain_exits_are_annotated_and_name_the_pages_in_the_guests_order(machines: type[Machine]) -> None:
    machine, seen = machines(), []
    for _ in range(8):
        assert machine.run() == EFAULT
        assert machine.vcpu.area.exit_reason == abi.EXIT_MEMORY_FAULT
        fault = machine.vcpu.area.memory_fault
        assert (fault.flags, fault.size_bytes) == (0, PAGE)
        seen.append(fault.gpa)
        machine.install(fault.gpa)
    assert seen == [WORKER, MAILBOXES, 0x20000, PARAMETERS, *range(DATA, DATA + 4 * PAGE, PAGE)]


def test_an_exit_repeats_until_the_page_is_there(machines: type[Machine]) -> None:
    machine = machines()
    for _ in range(5):
        assert machine.run() == EFAULT
        assert machine.vcpu.area.memory_fault.gpa == WORKER


def test_bare_exit_leaves_exit_reason_and_fills_the_union_with_garbage(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(bare=1.0))
    sampler = SimulatedSampler(machine.vcpu)
    machine.vcpu.area.memory_fault = MemoryFault(0, 0, 0)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == 0
    first = machine.vcpu.area.memory_fault
    assert first.gpa != 0
    assert sampler.newest() == WORKER
    assert sampler.newest() is None
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault != first


def test_a_bare_exit_may_lack_its_sample(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(bare=1.0, lost_sample=1.0))
    assert machine.run() == EFAULT
    assert SimulatedSampler(machine.vcpu).newest() is None


def test_a_stale_annotation_names_a_page_of_before(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(stale=1.0))
    machine.install(WORKER)
    assert machine.run() == EFAULT  # for the mailbox
    assert machine.vcpu.area.exit_reason == abi.EXIT_MEMORY_FAULT
    assert machine.vcpu.area.memory_fault.gpa == WORKER
    assert SimulatedSampler(machine.vcpu).newest() == MAILBOXES + 112


def test_an_emulated_access_is_an_mmio_exit_in_ram_that_the_vmm_completes(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(emulated=1.0))
    assert machine.run() == EFAULT  # an instruction fetch is not emulated
    machine.install(WORKER)
    assert machine.run() == RunResult(0, 0)
    area = machine.vcpu.area
    assert area.exit_reason == abi.EXIT_MMIO
    assert area.mmio == Mmio(MAILBOXES + 112, bytes(8), 8, is_write=False)
    machine.install(MAILBOXES)
    area.answer_mmio((41).to_bytes(8, "little"))
    assert machine.run() == RunResult(0, 0)
    assert read_mailboxes(machine.ram, 1)[0].boots == 42
    assert area.mmio == Mmio(0x20000, bytes(8), 8, is_write=True)


def test_an_emulated_write_is_done_by_the_vmm_and_not_again(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(emulated=1.0))
    machine.install_low()
    assert machine.run() == RunResult(0, 0)
    access = machine.vcpu.area.mmio
    assert access.gpa == DATA
    assert access.is_write
    machine.install(DATA)
    os.pwrite(machine.ram, access.data, DATA)
    assert machine.run() == RunResult(0, 0)
    assert machine.vcpu.area.mmio.gpa == DATA + PAGE
    assert os.pread(machine.ram, 8, DATA) == access.data


def test_mmio_is_completed_even_if_the_next_run_returns_at_once(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(emulated=1.0))
    machine.install(WORKER)
    machine.run()
    machine.vcpu.area.answer_mmio((7).to_bytes(8, "little"))
    machine.install(MAILBOXES)
    machine.vcpu.kick()
    assert machine.run() == RunResult(-1, errno.EINTR)
    machine.vcpu.area.immediate_exit = False
    machine.run()
    assert read_mailboxes(machine.ram, 1)[0].boots == 8


# ---- everything else ---------------------------------------------------------------------------------


def test_lost_race_is_annotated_for_a_present_page_and_does_not_stick(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(lost_race=1.0))
    machine.install_low()
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault == MemoryFault(0, MAILBOXES, PAGE)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault.gpa == 0x20000


def test_foreign_exits_come_in_four_shapes(machines: type[Machine]) -> None:
    seen = set()
    for seed in range(30):
        machine = machines(FaultProfile(foreign=1.0), seed=seed)
        machine.install_low()
        assert machine.run() == EFAULT
        seen.add(machine.vcpu.area.memory_fault)
    assert seen == {
        MemoryFault(abi.MEMORY_EXIT_FLAG_PRIVATE, 0, PAGE),
        MemoryFault(0, NO_SLOT_GPA, PAGE),
        MemoryFault(0, 0, 0),
        MemoryFault(0, RAM_BYTES - PAGE, 2 * PAGE),
    }


def test_poison_is_annotated_too(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(poisoned=1.0))
    machine.install_low()
    assert machine.run() == RunResult(-1, abi.EHWPOISON)
    assert machine.vcpu.area.memory_fault.gpa == MAILBOXES


def test_device_memory_is_outside_of_ram(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(device=1.0))
    machine.install_low()
    assert machine.run() == RunResult(0, 0)
    assert machine.vcpu.area.mmio.gpa == DEVICE_GPA


@pytest.mark.parametrize(
    ("profile", "error"), [(FaultProfile(interrupted=1.0), errno.EINTR), (FaultProfile(again=1.0), errno.EAGAIN)]
)
def test_signals(machines: type[Machine], profile: FaultProfile, error: int) -> None:
    assert machines(profile).run() == RunResult(-1, error)


def test_a_kick_lasts_until_it_is_cleared(machines: type[Machine]) -> None:
    machine = machines()
    machine.vcpu.kick()
    assert machine.run() == RunResult(-1, errno.EINTR)
    assert machine.run() == RunResult(-1, errno.EINTR)
    machine.vcpu.area.immediate_exit = False
    assert machine.run() == EFAULT


def test_other_registers_than_the_workers_shut_the_guest_down(machines: type[Machine]) -> None:
    machine = machines()
    machine.vcpu.set_registers(Registers(rip=0xFFF0))
    assert machine.run() == RunResult(0, 0)
    assert machine.vcpu.area.exit_reason == abi.EXIT_SHUTDOWN


@pytest.mark.parametrize("present", [True, False])
def test_kvmclock_update_of_an_absent_page_is_skipped_silently(machines: type[Machine], present: bool) -> None:
    machine = machines()
    machine.install(WORKER)
    if present:
        machine.install(CLOCKS)
    machine.vcpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: CLOCKS | 1})
    assert machine.run() == EFAULT
    assert machine.vcpu.skipped_clock_updates == (not present)
    assert os.pread(machine.ram, 4, CLOCKS) == (b"\2\0\0\0" if present else bytes(4))


def test_memory_that_nobody_watches_reads_as_zero(machines: type[Machine]) -> None:
    machine = machines(watched=False)
    machine.install_low()
    machine.run_until_kick(2000)
    (mailbox,) = read_mailboxes(machine.ram, 1)
    assert mailbox.passes > 0
    assert mailbox.errors == 0


def test_release_ends_the_watch(machines: type[Machine]) -> None:
    machine = machines()
    machine.install_low()
    assert machine.run() == EFAULT
    machine.vm.release()
    machine.run_until_kick(500)


# ---- NOWAIT interfaces of the patch series -----------------------------------------------------------


@pytest.mark.parametrize("interface", [ABSENT_MAPPING_FAULT, NOWAIT_ON_FAULT, EXIT_ON_MISSING, USERFAULT])
def test_enabling_the_capability_itself_fails(machines: type[Machine], interface: NowaitInterface) -> None:
    machine = machines(interfaces=[interface])
    assert machine.vm.check_extension(interface.capability) == 1
    with pytest.raises(OSError, match="22"):
        machine.vm.enable_capability(interface.capability, 1)


def test_without_the_interface_flag_and_capability_are_unknown(machines: type[Machine]) -> None:
    machine = machines()
    assert machine.vm.check_extension(abi.CAP_EXIT_ON_MISSING) == 0
    with pytest.raises(OSError, match="22"):
        machine.vm.set_memory_region(MemoryRegion(1, 1 << 3, 1 << 32, PAGE, HVA))


@pytest.mark.parametrize("interface", [NOWAIT_ON_FAULT, EXIT_ON_MISSING])
@pytest.mark.parametrize("with_flag", [True, False])
def test_the_memslot_flag_annotates(machines: type[Machine], interface: NowaitInterface, with_flag: bool) -> None:
    machine = machines(interfaces=[interface], flags=interface.memslot_flag * with_flag)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == (abi.EXIT_MEMORY_FAULT if with_flag else 0)


def test_version_3_annotates_only_after_the_info_capability_is_enabled(machines: type[Machine]) -> None:
    machine = machines(interfaces=[ABSENT_MAPPING_FAULT], flags=ABSENT_MAPPING_FAULT.memslot_flag)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == 0
    machine.vm.enable_capability(abi.CAP_MEMORY_FAULT_INFO, 1)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault == MemoryFault(0, WORKER, PAGE)


def test_other_versions_only_report_the_info_capability(machines: type[Machine]) -> None:
    machine = machines(interfaces=[EXIT_ON_MISSING])
    assert machine.vm.check_extension(abi.CAP_MEMORY_FAULT_INFO) == 1
    with pytest.raises(OSError, match="22"):
        machine.vm.enable_capability(abi.CAP_MEMORY_FAULT_INFO, 1)


def test_while_the_flag_is_being_set_a_vcpu_may_still_see_the_old_slots(machines: type[Machine]) -> None:
    machine = machines(FaultProfile(old_slots=1.0), interfaces=[EXIT_ON_MISSING])
    machine.vm.set_memory_region(MemoryRegion(0, EXIT_ON_MISSING.memslot_flag, 0, RAM_BYTES, HVA))
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == 0
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == abi.EXIT_MEMORY_FAULT


class Bitmap:
    """KVM Userfault's, all bits set."""

    def __init__(self) -> None:
        self.words = (ctypes.c_uint64 * (RAM_BYTES // PAGE // 64))(*([(1 << 64) - 1] * (RAM_BYTES // PAGE // 64)))

    def clear(self, gpa: int) -> None:
        self.words[gpa // PAGE // 64] &= ~(1 << gpa // PAGE % 64)

    def set(self, gpa: int) -> None:
        self.words[gpa // PAGE // 64] |= 1 << gpa // PAGE % 64


def test_the_bitmap_decides_and_is_read_at_the_fault(machines: type[Machine]) -> None:
    bitmap = Bitmap()
    machine = machines(interfaces=[USERFAULT], flags=USERFAULT.memslot_flag, bitmap_hva=ctypes.addressof(bitmap.words))
    machine.install(WORKER)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault == MemoryFault(abi.MEMORY_EXIT_FLAG_USERFAULT, WORKER, PAGE)
    bitmap.clear(WORKER)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault.gpa == MAILBOXES

    bitmap.set(WORKER)  # without effect on a page that the guest reaches already ...
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault.gpa == MAILBOXES
    region = MemoryRegion(0, 0, 0, RAM_BYTES, HVA)
    machine.vm.set_memory_region(region)  # ... until the flag is turned off and on
    machine.vm.set_memory_region(
        region._replace(flags=USERFAULT.memslot_flag, userfault_bitmap_hva=ctypes.addressof(bitmap.words))
    )
    assert machine.run() == EFAULT
    assert machine.vcpu.area.memory_fault.gpa == WORKER


def test_a_bad_bitmap_pointer_gives_a_plain_efault(machines: type[Machine]) -> None:
    machine = machines(interfaces=[USERFAULT], flags=USERFAULT.memslot_flag, bitmap_hva=PAGE)
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == 0


def test_the_bitmap_and_its_flag_go_together(machines: type[Machine]) -> None:
    machine = machines(interfaces=[USERFAULT])
    for flags, bitmap in ((USERFAULT.memslot_flag, 0), (0, PAGE)):
        with pytest.raises(OSError, match="22"):
            machine.vm.set_memory_region(MemoryRegion(0, flags, 0, RAM_BYTES, HVA, bitmap))


# ---- memslots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "error"),
    [
        (MemoryRegion(1, 0, RAM_BYTES - PAGE, PAGE, HVA), errno.EEXIST),
        (MemoryRegion(1, 0, RAM_BYTES + 1, PAGE, HVA), errno.EINVAL),
        (MemoryRegion(1, 1 << 30, RAM_BYTES, PAGE, HVA), errno.EINVAL),
        (MemoryRegion(512, 0, RAM_BYTES, PAGE, HVA), errno.EINVAL),
        (MemoryRegion(1, 0, RAM_BYTES, 0, HVA), errno.EINVAL),
    ],
)
def test_bad_memslots(machines: type[Machine], region: MemoryRegion, error: int) -> None:
    with pytest.raises(OSError, match=str(error)) as raised:
        machines().vm.set_memory_region(region)
    assert raised.value.errno == error


def test_memory_outside_of_every_slot_or_file_is_a_bare_efault(machines: type[Machine]) -> None:
    machine = machines()
    machine.vm.set_memory_region(MemoryRegion(0, 0, 0, 0, HVA))
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == 0
    assert machine.vcpu.translate(WORKER) is None
    machine.vm.set_memory_region(MemoryRegion(0, 0, 0, RAM_BYTES, HVA + RAM_BYTES))
    assert machine.run() == EFAULT
    assert machine.vcpu.area.exit_reason == 0
    assert machine.vcpu.translate(WORKER) == WORKER


# ---- the guest ---------------------------------------------------------------------------------------


def test_the_guest_finds_a_wrong_word_once(machines: type[Machine]) -> None:
    machine = machines(watched=False)
    machine.install_low()
    machine.run_until_kick(1000)
    (before,) = read_mailboxes(machine.ram, 1)
    assert before.passes > 0
    os.pwrite(machine.ram, b"wrong!!!", DATA + 5 * PAGE)
    machine.run_until_kick(2000)
    (after,) = read_mailboxes(machine.ram, 1)
    assert after.errors == 1
    assert after.error_gpa == DATA + 5 * PAGE
    assert after.error_seen == int.from_bytes(b"wrong!!!", "little")
    assert after.access_ticks // 1000 in (after.touched, after.touched + 1)
    assert after.access_max_ticks == 1000


def test_a_saved_vcpu_goes_on_in_another_vm(machines: type[Machine]) -> None:
    one = machines(watched=False)
    one.install_low()
    for steps in (17, 331, 1000):
        one.run_until_kick(steps)
        other = machines(watched=False)
        os.copy_file_range(one.ram, other.ram, RAM_BYTES, 0, 0)
        other.vcpu.set_registers(one.vcpu.get_registers())
        other.vcpu.set_msrs(one.vcpu.get_msrs([abi.MSR_TSC]))
        for machine in (one, other):
            machine.run_until_kick(500)
        assert other.vcpu.get_registers() == one.vcpu.get_registers()
        assert read_mailboxes(other.ram, 1) == read_mailboxes(one.ram, 1)
        assert read_mailboxes(one.ram, 1)[0].errors == 0


def test_vcpus_msrs_and_clock(machines: type[Machine]) -> None:
    vm, vcpu = (machine := machines()).vm, machine.vcpu
    for number, error in ((0, errno.EEXIST), (-1, errno.EINVAL), (1024, errno.EINVAL)):
        with pytest.raises(OSError) as raised:
            vm.create_vcpu(number)
        assert raised.value.errno == error
    assert vcpu.get_msrs([abi.MSR_TSC, 0x1234]) == {abi.MSR_TSC: 0}
    with pytest.raises(OSError, match="0x1234"):
        vcpu.set_msrs({0x1234: 1})
    vcpu.set_msrs({abi.MSR_TSC: 5000})
    vm.set_clock_ns(10**9)
    assert vm.get_clock_ns() == 10**9


def test_profiles_are_probabilities() -> None:
    with pytest.raises(ValueError, match=r"bare=1\.5"):
        FaultProfile(bare=1.5)


def test_run_area_is_the_kernels_layout() -> None:
    memory = bytearray(4096)
    area = RunArea(memory)
    area.exit_reason = 39
    area.immediate_exit = True
    area.memory_fault = MemoryFault(1, 2, 3)
    assert memory[:12] == b"\0\1\0\0\0\0\0\0" + (39).to_bytes(4, "little")
    assert memory[32:56] == b"".join(value.to_bytes(8, "little") for value in (1, 2, 3))
    area.mmio = Mmio(0xA000, b"\1\2\3\4", 4, is_write=True)
    assert area.mmio == Mmio(0xA000, b"\1\2\3\4", 4, is_write=True)
    area.answer_mmio(b"\5\6")
    assert area.mmio.data == b"\5\6\3\4"
