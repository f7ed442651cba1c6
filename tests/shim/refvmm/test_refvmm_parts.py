"""Memory, gate and far-fault reporting, each by itself."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from farfault_cli.errors import UsageError
from farfault_shim.attach.wire import AddressSource, FaultSource, Report, ReportKind, Verdict, VerdictKind
from farfault_shim.guest import Machine
from farfault_shim.kvm import abi
from farfault_shim.kvm.interface import RunResult
from farfault_shim.kvm.run_area import MemoryFault, Mmio
from farfault_shim.kvm.simulated import SimulatedSampler, SimulatedVcpu, SimulatedVm
from farfault_shim.kvm.simulated_memory import Backing
from farfault_shim.refvmm import gate as gate_module
from farfault_shim.refvmm.attachment import Attachment
from farfault_shim.refvmm.far_faults import FarFaultReporter
from farfault_shim.refvmm.gate import RunGate, StuckError
from farfault_shim.refvmm.memory import GuestMemory
from farfault_shim.refvmm.vcpu_thread import Next
from refvmm_rig import MIB, ram_path

GIB = 1 << 30
RAM_BYTES = 8 * MIB
EFAULT = RunResult(-1, errno.EFAULT)

# ---- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "ram_bytes", "low_bytes"),
    [(Machine.PC, 4 * GIB, 3 * GIB), (Machine.Q35, 3 * GIB, 2 * GIB), (Machine.FLAT, 3 * GIB, 3 * GIB)],
)
def test_ram_is_split_around_the_hole(machine: Machine, ram_bytes: int, low_bytes: int) -> None:
    with ram_path() as path:
        memory = GuestMemory(path, ram_bytes, machine)
        assert memory.offset_of(low_bytes - 8, 8) == low_bytes - 8
        assert memory.offset_of(low_bytes - 7, 8) is None
        high_bytes = ram_bytes - low_bytes
        assert memory.offset_of(4 * GIB) == (low_bytes if high_bytes else None)
        assert memory.offset_of(4 * GIB + high_bytes) is None
        assert sum(slot.size_bytes for slot in memory.slots()) == ram_bytes
        assert path.stat().st_blocks == 0
        memory.close()


def test_an_alias_shows_the_same_bytes() -> None:
    with ram_path() as path:
        memory = GuestMemory(path, RAM_BYTES, Machine.PC)
        assert memory.for_kvm is memory.base
        alias = memory.add_alias()
        assert memory.for_kvm is alias
        memory.write(0x8000, b"code")
        alias.populate(0x8000, 4096)
        assert alias.memory[0x8000:0x8004] == memory.base.memory[0x8000:0x8004] == b"code"
        memory.close()


def test_ram_needs_a_file_and_a_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few"):
        GuestMemory(tmp_path / "ram", 4096, Machine.PC)
    with pytest.raises(UsageError, match="cannot be RAM"):
        GuestMemory(tmp_path / "none" / "ram", RAM_BYTES, Machine.PC)
    with pytest.raises(UsageError, match="whole pages"):
        GuestMemory(tmp_path / "ram", RAM_BYTES + 5, Machine.PC)


# ---- gate ----------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with ram_path() as path:
        made = GuestMemory(path, RAM_BYTES, Machine.PC)
        yield made
        made.close()


@pytest.fixture
def vcpu(memory: GuestMemory) -> Iterator[SimulatedVcpu]:
    vm = SimulatedVm([Backing(memory.base.hva, RAM_BYTES, memory.descriptor)])
    yield vm.create_vcpu(0)
    vm.close()


def test_a_vcpu_that_does_not_come_back_is_named(vcpu: SimulatedVcpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "STOP_TIMEOUT_S", 0.0)
    monkeypatch.setattr(gate_module, "KICK_INTERVAL_S", 0.0)
    kicked: list[int] = []
    with pytest.raises(StuckError, match=r"vCPUs \[0\] did not stop"):
        RunGate(1).shut(kicked.append)
    assert set(kicked) <= {0}


def test_the_gate_clears_the_kick_of_who_passes(vcpu: SimulatedVcpu) -> None:
    gate = RunGate(1)
    vcpu.kick()
    gate.open()
    assert gate.pass_through(vcpu)
    assert not vcpu.area.immediate_exit
    gate.shut_soon(lambda number: vcpu.kick())
    assert vcpu.area.immediate_exit
    passed: list[bool] = []
    thread = threading.Thread(target=lambda: passed.append(gate.pass_through(vcpu)))
    thread.start()
    gate.shut(lambda number: vcpu.kick(), for_ever=True)
    thread.join()
    assert passed == [False]


# ---- far-fault reports ---------------------------------------------------------------------------------


class Link:
    """Takes reports and gives a verdict."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.verdict: Verdict | None = Verdict(0, VerdictKind.RETRY)
        self.passed = 0

    def ask(self, report: Report, kicked: object) -> Verdict | None:
        self.reports.append(report)
        return self.verdict

    def count_exit(self, report: Report) -> None:
        pass

    def count_passed(self) -> None:
        self.passed += 1


class Client:
    """Gives every vCPU the same link."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def vcpu(self, number: int) -> Link:
        return self._link


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
def reporter(vcpu: SimulatedVcpu, memory: GuestMemory, link: Link) -> FarFaultReporter:
    return FarFaultReporter(vcpu, Client(link), memory, SimulatedSampler(vcpu))  # type: ignore[arg-type]


def test_start_tells_registers_once_and_again_after_a_kick(
    vcpu: SimulatedVcpu, reporter: FarFaultReporter, link: Link
) -> None:
    special = bytearray(abi.SREGS_BYTES)
    abi.SREGS_CONTROL.pack_into(special, abi.SREGS_CONTROL_OFFSET, 0x80000001, 0, 0x1000, 0x20, 0, 0x500, 0)
    vcpu.set_special(bytes(special))
    vcpu.set_msrs({abi.MSR_KVM_SYSTEM_TIME_NEW: 0x60001})
    link.verdict = None
    assert reporter.prepare() is Next.KICKED
    link.verdict = Verdict(0, VerdictKind.RETRY)
    assert reporter.prepare() is Next.RUN
    assert reporter.prepare() is Next.RUN
    assert len(link.reports) == 2
    start = link.reports[1]
    assert start.kind is ReportKind.START
    assert (start.cr0, start.cr3, start.cr4, start.efer) == (0x80000001, 0x1000, 0x20, 0x500)
    assert start.msrs[1] == 0x60001
    assert not any(start.msrs[2:])


def test_an_annotated_exit_is_reported_as_it_is(vcpu: SimulatedVcpu, reporter: FarFaultReporter, link: Link) -> None:
    vcpu.area.exit_reason = abi.EXIT_MEMORY_FAULT
    vcpu.area.memory_fault = MemoryFault(16, 0x5000, 4096)
    assert reporter.settle(EFAULT) is Next.RUN
    report = link.reports[0]
    assert report.address_source is AddressSource.KVM_RUN
    assert (report.flags, report.gpa, report.size, report.exit_reason) == (16, 0x5000, 4096, 39)


def test_a_bare_exit_has_the_samples_address_or_none(
    vcpu: SimulatedVcpu, memory: GuestMemory, reporter: FarFaultReporter, link: Link
) -> None:
    assert reporter.settle(EFAULT) is Next.RUN
    vcpu.sampled_gva = 0x7123
    assert reporter.settle(EFAULT) is Next.RUN
    without, translated = link.reports
    assert without.address_source is AddressSource.NONE
    assert translated.gva == 0x7123
    assert translated.translate_failed
    assert translated.address_source is AddressSource.NONE


@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN, abi.EHWPOISON, errno.EINVAL])
def test_other_errors_are_not_reported(reporter: FarFaultReporter, link: Link, error: int) -> None:
    assert reporter.settle(RunResult(-1, error)) is Next.PASS
    assert not link.reports


def test_device_memory_is_not_reported(vcpu: SimulatedVcpu, reporter: FarFaultReporter, link: Link) -> None:
    vcpu.area.exit_reason = abi.EXIT_MMIO
    vcpu.area.mmio = Mmio(0xFEB00000, bytes(8), 4, is_write=False)
    assert reporter.settle(RunResult(0, 0)) is Next.PASS
    vcpu.area.exit_reason = abi.EXIT_HLT
    assert reporter.settle(RunResult(0, 0)) is Next.PASS
    assert not link.reports


@pytest.mark.parametrize("is_write", [True, False])
def test_an_emulated_access_is_completed_in_ram(
    vcpu: SimulatedVcpu, memory: GuestMemory, reporter: FarFaultReporter, link: Link, is_write: bool
) -> None:
    memory.write(0x5000, b"old word")
    vcpu.area.exit_reason = abi.EXIT_MMIO
    vcpu.area.mmio = Mmio(0x5000, b"new word", 8, is_write=is_write)
    link.verdict = Verdict(0, VerdictKind.COMPLETE)
    assert reporter.settle(RunResult(0, 0)) is Next.RUN
    assert os.pread(memory.descriptor, 8, 0x5000) == (b"new word" if is_write else b"old word")
    assert vcpu.area.mmio.data == (b"new word" if is_write else b"old word")


def test_an_access_that_leaves_ram_is_not_completed(
    vcpu: SimulatedVcpu, reporter: FarFaultReporter, link: Link
) -> None:
    vcpu.area.exit_reason = abi.EXIT_MMIO
    vcpu.area.mmio = Mmio(RAM_BYTES - 4, bytes(8), 8, is_write=True)
    link.verdict = Verdict(0, VerdictKind.COMPLETE)
    assert reporter.settle(RunResult(0, 0)) is Next.PASS
    assert link.passed == 1


def test_verdicts_are_obeyed(vcpu: SimulatedVcpu, reporter: FarFaultReporter, link: Link) -> None:
    link.verdict = Verdict(0, VerdictKind.PASS)
    assert reporter.settle(EFAULT) is Next.PASS
    assert link.passed == 1
    link.verdict = None
    assert reporter.settle(EFAULT) is Next.KICKED
    link.verdict = Verdict(0, VerdictKind.RETRY, flags=1, gpa=0x5000, size=4096)
    assert reporter.settle(EFAULT) is Next.RUN


def test_fault_sources_map_memory_as_they_need_it(memory: GuestMemory, tmp_path: Path) -> None:
    attachment = Attachment(tmp_path / "ff.sock", memory, FaultSource.SIMULATED)
    assert memory.alias is None
    assert attachment.may_save()
    assert attachment.client.state.slots() == memory.slots()
    attachment.client.close()
