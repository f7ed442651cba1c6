"""Numbers and structs against the kernel header that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from farfault_shim.kvm import abi

COMPILER = shutil.which("gcc") or shutil.which("cc")
NUMBERS = [
    *("GET_API_VERSION", "CREATE_VM", "CHECK_EXTENSION", "GET_VCPU_MMAP_SIZE", "GET_SUPPORTED_CPUID", "CREATE_VCPU"),
    *("SET_USER_MEMORY_REGION", "SET_USER_MEMORY_REGION2", "SET_TSS_ADDR", "CREATE_IRQCHIP", "SET_CLOCK", "GET_CLOCK"),
    *("ENABLE_CAP", "RUN", "GET_REGS", "SET_REGS", "GET_SREGS", "SET_SREGS", "TRANSLATE", "GET_MSRS", "SET_MSRS"),
    *("SET_SIGNAL_MASK", "GET_FPU", "SET_FPU", "SET_CPUID2", "GET_XSAVE", "SET_XSAVE"),
    *("CAP_USER_MEMORY", "CAP_NR_VCPUS", "CAP_NR_MEMSLOTS", "CAP_XSAVE", "CAP_MAX_VCPUS", "CAP_READONLY_MEM"),
    *("CAP_IMMEDIATE_EXIT", "CAP_USER_MEMORY2", "CAP_MEMORY_FAULT_INFO", "CAP_MEMORY_ATTRIBUTES", "CAP_GUEST_MEMFD"),
    *("MEM_LOG_DIRTY_PAGES", "MEM_READONLY", "MEM_GUEST_MEMFD", "API_VERSION"),
    *("EXIT_UNKNOWN", "EXIT_IO", "EXIT_HLT", "EXIT_MMIO", "EXIT_SHUTDOWN", "EXIT_FAIL_ENTRY", "EXIT_INTR"),
    *("EXIT_INTERNAL_ERROR", "EXIT_MEMORY_FAULT", "MEMORY_EXIT_FLAG_PRIVATE"),
]
NEWER_THAN_6_1 = {
    *("SET_USER_MEMORY_REGION2", "CAP_USER_MEMORY2", "CAP_MEMORY_FAULT_INFO", "CAP_MEMORY_ATTRIBUTES"),
    *("CAP_GUEST_MEMFD", "MEM_GUEST_MEMFD", "EXIT_MEMORY_FAULT", "MEMORY_EXIT_FLAG_PRIVATE"),
}
EXPRESSIONS = {
    "sizeof(struct kvm_userspace_memory_region)": abi.MEMORY_REGION.size,
    "sizeof(struct kvm_regs)": abi.REGS.size,
    "sizeof(struct kvm_segment)": abi.SEGMENT.size,
    "sizeof(struct kvm_sregs)": abi.SREGS_BYTES,
    "offsetof(struct kvm_sregs, cr0)": abi.SREGS_CONTROL_OFFSET,
    "offsetof(struct kvm_sregs, interrupt_bitmap)": abi.SREGS_CONTROL_OFFSET + abi.SREGS_CONTROL.size,
    "sizeof(struct kvm_translation)": abi.TRANSLATION.size,
    "sizeof(struct kvm_msrs)": abi.MSRS.size,
    "sizeof(struct kvm_msr_entry)": abi.MSR_ENTRY.size,
    "sizeof(struct kvm_cpuid2)": abi.CPUID2.size,
    "sizeof(struct kvm_cpuid_entry2)": abi.CPUID_ENTRY.size,
    "sizeof(struct kvm_enable_cap)": abi.ENABLE_CAP_ARGUMENT.size,
    "sizeof(struct kvm_clock_data)": abi.CLOCK_DATA.size,
    "offsetof(struct kvm_clock_data, host_tsc)": 24,
    "sizeof(struct kvm_fpu)": abi.FPU_BYTES,
    "sizeof(struct kvm_xsave)": abi.XSAVE_BYTES,
    "offsetof(struct kvm_run, immediate_exit)": abi.RUN_IMMEDIATE_EXIT,
    "offsetof(struct kvm_run, exit_reason)": abi.RUN_EXIT_REASON,
    "offsetof(struct kvm_run, mmio)": abi.RUN_UNION,
    "offsetof(struct kvm_run, mmio.data)": abi.RUN_MMIO_DATA,
    "offsetof(struct kvm_run, mmio.len)": abi.RUN_UNION + 16,
    "offsetof(struct kvm_run, mmio.is_write)": abi.RUN_UNION + 20,
    "sizeof(((struct kvm_run *)0)->padding)": abi.RUN_UNION_BYTES,
}
NEWER_EXPRESSIONS = {
    "sizeof(struct kvm_userspace_memory_region2)": ("KVM_SET_USER_MEMORY_REGION2", abi.MEMORY_REGION2.size),
    "offsetof(struct kvm_run, memory_fault.size)": ("KVM_EXIT_MEMORY_FAULT", abi.RUN_UNION + 16),
}


def _program() -> str:
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/kvm.h>", "int main(void) {"]
    for name in NUMBERS:
        if name in NEWER_THAN_6_1:
            lines += [f"#ifdef KVM_{name}"]
        lines += [f'  printf("{name} %llu\\n", (unsigned long long)KVM_{name});']
        if name in NEWER_THAN_6_1:
            lines += ["#endif"]
    lines += [f'  printf("{text}=%zu\\n", {text});' for text in EXPRESSIONS]
    for text, (needed, _) in NEWER_EXPRESSIONS.items():
        lines += [f"#ifdef {needed}", f'  printf("{text}=%zu\\n", {text});', "#endif"]
    return "\n".join([*lines, "}"])


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    if COMPILER is None:
        pytest.skip("no C compiler")
    if os.uname().machine != "x86_64" or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no linux/kvm.h of x86-64")
    folder = tmp_path_factory.mktemp("abi")
    (folder / "abi.c").write_text(_program())
    subprocess.run([COMPILER, "-w", "-o", folder / "abi", folder / "abi.c"], check=True)
    output = subprocess.run([folder / "abi"], check=True, capture_output=True, text=True).stdout
    separator = {True: "=", False: " "}
    pairs = (line.rsplit(separator["=" in line], 1) for line in output.splitlines())
    return {name: int(value) for name, value in pairs}


@pytest.mark.parametrize("name", NUMBERS)
def test_number(header: dict[str, int], name: str) -> None:
    if name not in header:
        assert name in NEWER_THAN_6_1
        return  # the installed header is older; the number is that of Linux 6.8
    assert getattr(abi, name) == header[name]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_struct(header: dict[str, int], text: str) -> None:
    assert header[text] == EXPRESSIONS[text]


@pytest.mark.parametrize("text", NEWER_EXPRESSIONS)
def test_newer_struct(header: dict[str, int], text: str) -> None:
    assert header.get(text, NEWER_EXPRESSIONS[text][1]) == NEWER_EXPRESSIONS[text][1]
    assert abi.MEMORY_REGION2.size == 160
    assert abi.RUN_MEMORY_FAULT.size == 24
