"""The thin driver of /dev/kvm."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from farfault_shim.kvm import abi
from farfault_shim.kvm.interface import MemoryRegion, RunResult
from farfault_shim.kvm.real import KvmUnavailableError, RealVm, install_kick_signal
from farfault_shim.kvm.registers import Registers, control_registers, user_long_mode
from farfault_shim.refvmm.boot import PML4, page_tables
from farfault_shim.refvmm.memory import Mapping

RAM_BYTES = 4 << 20
CODE = 0x8000
JUMP_TO_ITSELF = b"\xeb\xfe"
LOAD_FROM_DEVICE = b"\x8b\x07"  # mov eax, [rdi]

needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened")


@pytest.fixture
def vm() -> Iterator[RealVm]:
    install_kick_signal()
    made = RealVm()
    yield made
    made.close()


@pytest.fixture
def ram() -> Iterator[Mapping]:
    descriptor = os.memfd_create("ram")
    os.ftruncate(descriptor, RAM_BYTES)
    mapping = Mapping(descriptor, RAM_BYTES)
    for gpa, table in page_tables(4).items():
        mapping.memory[gpa : gpa + len(table)] = table
    yield mapping
    mapping.close()
    os.close(descriptor)


@needs_kvm
def test_capabilities(vm: RealVm) -> None:
    assert vm.kind == "kvm"
    assert vm.check_extension(abi.CAP_USER_MEMORY) == 1
    assert vm.check_extension(abi.CAP_IMMEDIATE_EXIT) == 1
    with pytest.raises(OSError, match="Invalid argument"):
        vm.enable_capability(abi.CAP_EXIT_ON_MISSING, 1)


@needs_kvm
def test_registers_survive(vm: RealVm, ram: Mapping) -> None:
    vm.set_memory_region(MemoryRegion(0, 0, 0, RAM_BYTES, ram.hva))
    vcpu = vm.create_vcpu(0)
    registers = Registers(*range(1, 17), rip=CODE, rflags=2)
    vcpu.set_registers(registers)
    assert vcpu.get_registers() == registers
    special = user_long_mode(vcpu.get_special(), PML4)
    vcpu.set_special(special)
    assert control_registers(vcpu.get_special()) == control_registers(special)
    xsave = vcpu.get_xsave()
    vcpu.set_xsave(xsave)
    assert len(xsave) == abi.XSAVE_BYTES
    assert vcpu.translate(CODE + 5) == CODE + 5
    assert vcpu.translate(1 << 40) is None
    vcpu.close()


@needs_kvm
def test_msrs_and_clock(vm: RealVm) -> None:
    vcpu = vm.create_vcpu(0)
    assert vcpu.get_msrs([abi.MSR_TSC])[abi.MSR_TSC] > 0
    assert vcpu.get_msrs([0xDEADBEEF]) == {}
    with pytest.raises(OSError, match="0xdeadbeef"):
        vcpu.set_msrs({0xDEADBEEF: 1})
    vm.set_clock_ns(10**15)
    assert 10**15 <= vm.get_clock_ns() < 10**15 + 10**12
    vcpu.close()


@needs_kvm
def test_a_kick_ends_an_endless_guest_and_lasts(vm: RealVm, ram: Mapping) -> None:
    ram.memory[CODE : CODE + 2] = JUMP_TO_ITSELF
    vm.set_memory_region(MemoryRegion(0, 0, 0, RAM_BYTES, ram.hva))
    vcpu = vm.create_vcpu(0)
    vcpu.set_special(user_long_mode(vcpu.get_special(), PML4))
    vcpu.set_registers(Registers(rip=CODE))
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(vcpu.run()))
    thread.start()
    vcpu.kick()
    thread.join(30)
    assert results == [RunResult(-1, errno.EINTR)]
    assert vcpu.run() == RunResult(-1, errno.EINTR)
    vcpu.close()


@needs_kvm
def test_device_access_and_its_answer(vm: RealVm, ram: Mapping) -> None:
    ram.memory[CODE : CODE + 4] = LOAD_FROM_DEVICE + LOAD_FROM_DEVICE
    vm.set_memory_region(MemoryRegion(0, 0, 0, RAM_BYTES, ram.hva))
    vcpu = vm.create_vcpu(0)
    vcpu.set_special(user_long_mode(vcpu.get_special(), PML4))
    vcpu.set_registers(Registers(rip=CODE, rdi=0xC000_0000))
    assert vcpu.run() == RunResult(0, 0)
    assert vcpu.area.exit_reason == abi.EXIT_MMIO
    assert (vcpu.area.mmio.gpa, vcpu.area.mmio.size_bytes, vcpu.area.mmio.is_write) == (0xC000_0000, 4, False)
    vcpu.area.answer_mmio(b"\x44\x33\x22\x11")
    assert vcpu.run() == RunResult(0, 0)
    assert vcpu.get_registers().rax == 0x11223344
    vcpu.close()


def test_without_kvm_the_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KvmUnavailableError, match="--simulated"):
        RealVm(str(tmp_path / "kvm"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KvmUnavailableError, match="is not KVM"):
        RealVm(str(tmp_path / "file"))


def test_page_tables_map_one_to_one() -> None:
    tables = page_tables(5)
    assert len(tables) == 7
    last = int.from_bytes(tables[max(tables)][-8:], "little")
    assert last & -mmap.PAGESIZE == (5 << 30) - (2 << 20)
