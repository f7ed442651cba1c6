"""A VM of one vCPU that touches absent pages: what does KVM_RUN return, and does the annotator name the page?

Run as ``python -m farfault_shim.sources.scratch_vm REQUEST`` in a process of its own, because a vCPU that
waits for ever must not take the caller along. The request and the report are JSON objects.

The guest is at CPL3 in long mode. It reads the first word of each data page and then stores to device
memory, which ends the trial. Data pages lie at another virtual than physical address, so that a tracepoint
that gives one cannot be mistaken for one that gives the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

from farfault_shim.annotate.annotator import AddressKind, Annotator
from farfault_shim.annotate.perf import SamplerUnavailableError, TracepointSampler
from farfault_shim.kvm import abi
from farfault_shim.kvm.nowait import NowaitInterface, NowaitSeries
from farfault_shim.sources.kernel_interface import info_capability
from farfault_shim.uffd import abi as uffd_abi
from farfault_shim.uffd.userfaultfd import Userfaultfd, UserfaultfdUnavailableError

PAGE_BYTES: Final = 4096
RAM_BYTES: Final = 32 << 20
DATA_GPA: Final = 16 << 20
DATA_GVA: Final = (1 << 30) + DATA_GPA
DATA_PAGES: Final = 48
CODE: Final = 0x8000
DEVICE_GPA: Final = 0xF000_0000
EXITS_MAX: Final = DATA_PAGES * 8
TABLE_FLAGS: Final = 0x7
LARGE_FLAGS: Final = 0x87

# xor rax,rax; 1: add rax,[rsi]; add rsi,4096; dec rcx; jnz 1b; mov edi,0xf0000000; mov [rdi],eax; jmp $
PROGRAM: Final = bytes.fromhex("4831c0 480306 4881c600100000 48ffc9 75f1 bf000000f0 8907 ebfe")
MEMORY_FAULT_INFO_ENABLE: Final = 1
"""args[0] of KVM_ENABLE_CAP for KVM_CAP_MEMORY_FAULT_INFO in the absent-mapping-fault series."""


def run_request(request: dict[str, Any]) -> dict[str, Any]:
    """Runs one trial.

    Args:
        request: ``annotators`` (kind to event id, offset, size) and, for a kernel interface, ``interface``
            (series, capability, memslot flag); ``userfaultfd_device_fd``: an inherited descriptor.

    Returns:
        ``problem`` where the VM could not be made; else counts of exits and of addresses that were right.
    """
    interface = request.get("interface")
    report: dict[str, Any] = {"bare": 0, "annotated": 0, "mmio": 0, "right": {}, "notes": []}
    try:
        with contextlib.ExitStack() as stack:
            device_fd = request.get("userfaultfd_device_fd")
            machine = _Machine(stack, None if interface is None else _interface(interface), device_fd, report)
            samplers = {
                kind: stack.enter_context(contextlib.closing(TracepointSampler(Annotator(AddressKind(kind), *fields))))
                for kind, fields in request.get("annotators", {}).items()
            }
            machine.run(samplers)
    except (SamplerUnavailableError, UserfaultfdUnavailableError) as error:
        report["problem"] = error.problem
    except OSError as error:
        report["problem"] = report.get("step", "scratch VM") + f": {error.strerror}"
    return report


def _interface(fields: list[Any]) -> NowaitInterface:
    series, capability, flag = fields
    return NowaitInterface(NowaitSeries(series), capability, flag)


class _Machine:
    """The VM, its memory and its vCPU."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        interface: NowaitInterface | None,
        device_fd: int | None,
        report: dict[str, Any],
    ) -> None:
        self._report = report
        self._device_fd = device_fd
        self._source = os.urandom(DATA_PAGES * PAGE_BYTES)
        self._bitmap: ctypes.Array[ctypes.c_uint64] | None = None
        kvm = _open(stack, os.open(abi.DEVICE, os.O_RDWR | os.O_CLOEXEC))
        report["step"] = "KVM_CREATE_VM"
        self._vm = _open(stack, fcntl.ioctl(kvm, abi.CREATE_VM, 0))
        if interface is not None:
            self._ask_capabilities(interface)
        self._make_memory(stack, interface)
        self._set_slot(interface)
        report["step"] = "KVM_CREATE_VCPU"
        self._vcpu = _open(stack, fcntl.ioctl(self._vm, abi.CREATE_VCPU, 0))
        self._run_area = stack.enter_context(mmap.mmap(self._vcpu, fcntl.ioctl(kvm, abi.GET_VCPU_MMAP_SIZE)))
        self._set_registers()

    def _ask_capabilities(self, interface: NowaitInterface) -> None:
        """An informational capability must refuse to be enabled; that of the fault information may need it."""
        info = info_capability(interface)
        if info is not None:
            argument = abi.ENABLE_CAP_ARGUMENT.pack(info, 0, MEMORY_FAULT_INFO_ENABLE, 0, 0, 0)
            self._report["notes"].append(f"KVM_CAP_MEMORY_FAULT_INFO enabled: {self._enable(argument)}")
        self._report["has_capability"] = fcntl.ioctl(self._vm, abi.CHECK_EXTENSION, interface.capability) > 0
        argument = abi.ENABLE_CAP_ARGUMENT.pack(interface.capability, 0, 0, 0, 0, 0)
        self._report["notes"].append(f"direct KVM_ENABLE_CAP({interface.capability}): {self._enable(argument)}")

    def _enable(self, argument: bytes) -> str:
        try:
            fcntl.ioctl(self._vm, abi.ENABLE_CAP, argument)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error.errno))
        return "accepted"

    def _make_memory(self, stack: contextlib.ExitStack, interface: NowaitInterface | None) -> None:
        self._report["step"] = "userfaultfd"
        memory = _open(stack, os.memfd_create("farfault-scratch", os.MFD_CLOEXEC))
        os.truncate(memory, RAM_BYTES)
        for address, data in _low_memory().items():
            os.pwrite(memory, data, address)
        mapping = mmap.mmap(memory, RAM_BYTES, flags=mmap.MAP_SHARED)
        anchor = ctypes.c_char.from_buffer(mapping)
        self._base = ctypes.addressof(anchor)
        stack.callback(mapping.close)
        stack.callback(self.__dict__.pop, "_anchor", None)
        self._anchor = anchor
        self._uffd = Userfaultfd.create(uffd_abi.FEATURE_SIGBUS if interface is None else 0, self._device_fd)
        stack.callback(self._uffd.close)
        self._uffd.register(self._base, RAM_BYTES)
        del anchor

    def _set_slot(self, interface: NowaitInterface | None) -> None:
        flags = 0 if interface is None else interface.memslot_flag
        self._report["step"] = f"KVM_SET_USER_MEMORY_REGION with flag {flags:#x}" if flags else "the memslot"
        if interface is None or not interface.has_bitmap:
            region = abi.MEMORY_REGION.pack(0, flags, 0, RAM_BYTES, self._base)
            fcntl.ioctl(self._vm, abi.SET_USER_MEMORY_REGION, region)
            return
        self._bitmap = (ctypes.c_uint64 * (RAM_BYTES // PAGE_BYTES // 64))()
        for page in range(DATA_GPA // PAGE_BYTES, DATA_GPA // PAGE_BYTES + DATA_PAGES):
            self._bitmap[page // 64] |= 1 << page % 64
        bitmap = ctypes.addressof(self._bitmap)
        region = abi.MEMORY_REGION2.pack(0, flags, 0, RAM_BYTES, self._base, 0, 0, 0, bitmap)
        fcntl.ioctl(self._vm, abi.SET_USER_MEMORY_REGION2, region)

    def _set_registers(self) -> None:
        sregs = bytearray(abi.SREGS_BYTES)
        fcntl.ioctl(self._vcpu, abi.GET_SREGS, sregs)
        code = abi.SEGMENT.pack(0, 0xFFFFFFFF, 0x33, 11, 1, 3, 0, 1, 1, 1, 0, 0, 0)
        data = abi.SEGMENT.pack(0, 0xFFFFFFFF, 0x2B, 3, 1, 3, 1, 1, 0, 1, 0, 0, 0)
        sregs[: 6 * abi.SEGMENT.size] = code + data * 5
        control = list(abi.SREGS_CONTROL.unpack_from(sregs, abi.SREGS_CONTROL_OFFSET))
        control[0], control[2], control[3], control[5] = 0x80050033, 0x1000, 0x620, 0xD01
        abi.SREGS_CONTROL.pack_into(sregs, abi.SREGS_CONTROL_OFFSET, *control)
        fcntl.ioctl(self._vcpu, abi.SET_SREGS, sregs)
        registers = [0] * 18
        registers[2], registers[4] = DATA_PAGES, DATA_GVA  # rcx, rsi
        registers[16], registers[17] = CODE, 0x2
        fcntl.ioctl(self._vcpu, abi.SET_REGS, abi.REGS.pack(*registers))

    def run(self, samplers: dict[str, TracepointSampler]) -> None:
        """Runs the guest to its end; each absent page is installed when it is missed."""
        self._report["step"] = "KVM_RUN"
        for _ in range(EXITS_MAX):
            for sampler in samplers.values():
                sampler.newest()
            reason, error = self._enter()
            truth = self._registers()[4] - DATA_GVA + DATA_GPA
            if error == errno.EFAULT:
                self._count_fault(reason, truth, samplers)
                self._install(truth)
            elif error:
                raise OSError(error, os.strerror(error))
            elif reason == abi.EXIT_MMIO:
                gpa = abi.RUN_MMIO.unpack_from(self._run_area, abi.RUN_UNION)[0]
                if gpa != DEVICE_GPA:
                    self._report["mmio"] += 1
                    self._report["problem"] = f"an absent page came as MMIO at {gpa:#x}"
                    return
                words = struct.unpack(f"<{DATA_PAGES}Q", b"".join(self._source[i : i + 8] for i in _page_starts()))
                self._report["finished"] = self._registers()[0] == sum(words) % (1 << 64)
                return
            else:
                self._report["problem"] = f"KVM_RUN ended with exit reason {reason}"
                return
        self._report["problem"] = f"the guest made no progress in {EXITS_MAX} exits"

    def _enter(self) -> tuple[int, int]:
        """KVM_RUN. Returns exit_reason, which was cleared before, and errno or 0."""
        self._run_area[abi.RUN_EXIT_REASON : abi.RUN_EXIT_REASON + 4] = bytes(4)
        error = 0
        try:
            fcntl.ioctl(self._vcpu, abi.RUN, 0)
        except OSError as failure:
            error = failure.errno or errno.EIO
        reason = int.from_bytes(self._run_area[abi.RUN_EXIT_REASON : abi.RUN_EXIT_REASON + 4], "little")
        return reason, error

    def _count_fault(self, reason: int, truth: int, samplers: dict[str, TracepointSampler]) -> None:
        right: dict[str, int] = self._report["right"]
        samples = {kind: sampler.newest() for kind, sampler in samplers.items()}
        if reason == abi.EXIT_MEMORY_FAULT:
            self._report["annotated"] += 1
            _, gpa, size_bytes = abi.RUN_MEMORY_FAULT.unpack_from(self._run_area, abi.RUN_UNION)
            samples["kvm_run"] = gpa if gpa <= truth < gpa + size_bytes else None
        else:
            self._report["bare"] += 1
        for kind, address in samples.items():
            gpa = self._translate(address) if kind == AddressKind.GVA.value and address is not None else address
            right[kind] = right.get(kind, 0) + (gpa is not None and gpa // PAGE_BYTES == truth // PAGE_BYTES)

    def _translate(self, gva: int) -> int | None:
        argument = bytearray(abi.TRANSLATION.pack(gva, 0, 0, 0, 0))
        fcntl.ioctl(self._vcpu, abi.TRANSLATE, argument)
        _, gpa, valid, _, _ = abi.TRANSLATION.unpack(argument)
        return int(gpa) if valid else None

    def _install(self, gpa: int) -> None:
        page = gpa // PAGE_BYTES
        outcome = self._uffd.copy(
            self._base + page * PAGE_BYTES, self._source, (page - DATA_GPA // PAGE_BYTES) * PAGE_BYTES, PAGE_BYTES
        )
        if outcome.error not in (0, errno.EEXIST):
            raise OSError(outcome.error, os.strerror(outcome.error))
        if self._bitmap is not None:
            self._bitmap[page // 64] &= ~(1 << page % 64)

    def _registers(self) -> tuple[int, ...]:
        registers = bytearray(abi.REGS.size)
        fcntl.ioctl(self._vcpu, abi.GET_REGS, registers)
        return abi.REGS.unpack(registers)


def _open(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _page_starts() -> Iterator[int]:
    return iter(range(0, DATA_PAGES * PAGE_BYTES, PAGE_BYTES))


def _low_memory() -> dict[int, bytes]:
    """Page tables and program, by guest physical address."""

    def table(entries: dict[int, int]) -> bytes:
        return b"".join(entries.get(index, 0).to_bytes(8, "little") for index in range(512))

    def large_pages(first_gpa: int) -> bytes:
        return table({index: first_gpa + (index << 21) | LARGE_FLAGS for index in range(512)})

    return {
        0x1000: table({0: 0x2000 | TABLE_FLAGS}),
        0x2000: table({0: 0x3000 | TABLE_FLAGS, 1: 0x3000 | TABLE_FLAGS, 3: 0x4000 | TABLE_FLAGS}),
        0x3000: large_pages(0),
        0x4000: large_pages(0xC000_0000),
        CODE: PROGRAM,
    }


if __name__ == "__main__":
    print(json.dumps(run_request(json.loads(sys.argv[1]))))
