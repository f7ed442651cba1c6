"""KVM by /dev/kvm. Thin: every method is an ioctl or two."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Final

from farfault_cli.errors import FarfaultError

from farfault_shim.kvm import abi
from farfault_shim.kvm.interface import MemoryRegion, RunResult
from farfault_shim.kvm.registers import Registers
from farfault_shim.kvm.run_area import RunArea

KICK_SIGNAL: Final = signal.SIGUSR1
_SUCCESS: Final = RunResult(0, 0)


class KvmUnavailableError(FarfaultError):
    """/dev/kvm cannot be used."""


def install_kick_signal() -> None:
    """Lets `RealVcpu.kick` interrupt KVM_RUN. Once in a process, from its main thread.

    The handler does nothing: that the system call ends is all that is wanted.
    """
    signal.signal(KICK_SIGNAL, _ignore)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


class RealVm:
    """A VM of the kernel's KVM.

    Args:
        device: path of the KVM device.

    Raises:
        KvmUnavailableError: it cannot be opened, or is not KVM.
    """

    kind: Final = "kvm"

    def __init__(self, device: str = abi.DEVICE) -> None:
        self._system = _open(device)
        try:
            self._descriptor = fcntl.ioctl(self._system, abi.CREATE_VM, 0)
            self._run_bytes = fcntl.ioctl(self._system, abi.GET_VCPU_MMAP_SIZE, 0)
        except OSError as error:
            os.close(self._system)
            raise KvmUnavailableError(f"{device}: no VM can be made: {error.strerror}", "see dmesg") from error

    def check_extension(self, capability: int) -> int:
        return fcntl.ioctl(self._descriptor, abi.CHECK_EXTENSION, capability)

    def enable_capability(self, capability: int, argument: int = 0) -> None:
        fcntl.ioctl(self._descriptor, abi.ENABLE_CAP, abi.ENABLE_CAP_ARGUMENT.pack(capability, 0, argument, 0, 0, 0))

    def set_memory_region(self, region: MemoryRegion) -> None:
        common = region[:5]
        if region.userfault_bitmap_hva:
            argument = abi.MEMORY_REGION2.pack(*common, 0, 0, 0, region.userfault_bitmap_hva)
            fcntl.ioctl(self._descriptor, abi.SET_USER_MEMORY_REGION2, argument)
        else:
            fcntl.ioctl(self._descriptor, abi.SET_USER_MEMORY_REGION, abi.MEMORY_REGION.pack(*common))

    def create_vcpu(self, number: int) -> RealVcpu:
        descriptor = fcntl.ioctl(self._descriptor, abi.CREATE_VCPU, number)
        try:
            fcntl.ioctl(descriptor, abi.SET_CPUID2, self._supported_cpuid())
            return RealVcpu(number, descriptor, self._run_bytes)
        except OSError:
            os.close(descriptor)
            raise

    def get_clock_ns(self) -> int:
        clock = bytearray(abi.CLOCK_DATA.size)
        fcntl.ioctl(self._descriptor, abi.GET_CLOCK, clock)
        return int(abi.CLOCK_DATA.unpack(clock)[0])

    def set_clock_ns(self, clock_ns: int) -> None:
        fcntl.ioctl(self._descriptor, abi.SET_CLOCK, abi.CLOCK_DATA.pack(clock_ns, 0, 0, 0))

    def close(self) -> None:
        os.close(self._descriptor)
        os.close(self._system)

    def _supported_cpuid(self) -> bytearray:
        entries = bytearray(abi.CPUID2.size + abi.CPUID_ENTRIES_MAX * abi.CPUID_ENTRY.size)
        abi.CPUID2.pack_into(entries, 0, abi.CPUID_ENTRIES_MAX, 0)
        fcntl.ioctl(self._system, abi.GET_SUPPORTED_CPUID, entries)
        return entries


class RealVcpu:
    """A vCPU of the kernel's KVM; owns its descriptor."""

    def __init__(self, number: int, descriptor: int, run_bytes: int) -> None:
        self.number = number
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, run_bytes, flags=mmap.MAP_SHARED)
        self.area = RunArea(self._memory)
        self._thread_ident = 0

    def run(self) -> RunResult:
        self._thread_ident = threading.get_ident()
        try:
            fcntl.ioctl(self._descriptor, abi.RUN, 0)
        except OSError as error:
            return RunResult(-1, error.errno or errno.EIO)
        return _SUCCESS

    def kick(self) -> None:
        self.area.immediate_exit = True
        if self._thread_ident:
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(self._thread_ident, KICK_SIGNAL)

    def get_registers(self) -> Registers:
        return Registers.unpack(self._get(abi.GET_REGS, abi.REGS.size))

    def set_registers(self, registers: Registers) -> None:
        fcntl.ioctl(self._descriptor, abi.SET_REGS, registers.pack())

    def get_special(self) -> bytes:
        return bytes(self._get(abi.GET_SREGS, abi.SREGS_BYTES))

    def set_special(self, special: bytes) -> None:
        fcntl.ioctl(self._descriptor, abi.SET_SREGS, special)

    def get_xsave(self) -> bytes:
        return bytes(self._get(abi.GET_XSAVE, abi.XSAVE_BYTES))

    def set_xsave(self, xsave: bytes) -> None:
        fcntl.ioctl(self._descriptor, abi.SET_XSAVE, bytearray(xsave))

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        values: dict[int, int] = {}
        for index in indices:
            request = bytearray(abi.MSRS.pack(1, 0) + abi.MSR_ENTRY.pack(index, 0, 0))
            if fcntl.ioctl(self._descriptor, abi.GET_MSRS, request) == 1:
                values[index] = int(abi.MSR_ENTRY.unpack_from(request, abi.MSRS.size)[2])
        return values

    def set_msrs(self, values: Mapping[int, int]) -> None:
        for index, value in values.items():
            request = abi.MSRS.pack(1, 0) + abi.MSR_ENTRY.pack(index, 0, value)
            if fcntl.ioctl(self._descriptor, abi.SET_MSRS, bytearray(request)) != 1:
                raise OSError(errno.EINVAL, f"MSR {index:#x} cannot be set to {value:#x}")

    def translate(self, gva: int) -> int | None:
        request = bytearray(abi.TRANSLATION.pack(gva, 0, 0, 0, 0))
        try:
            fcntl.ioctl(self._descriptor, abi.TRANSLATE, request)
        except OSError:
            return None
        _, physical, valid, *_ = abi.TRANSLATION.unpack(request)
        return int(physical) if valid else None

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)

    def _get(self, request: int, size_bytes: int) -> bytearray:
        data = bytearray(size_bytes)
        fcntl.ioctl(self._descriptor, request, data)
        return data


def _open(device: str) -> int:
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KvmUnavailableError(
            f"{device} cannot be opened: {error.strerror}",
            "load kvm_intel or kvm_amd and join the group kvm, or use --simulated",
        ) from error
    try:
        version = fcntl.ioctl(descriptor, abi.GET_API_VERSION, 0)
    except OSError as error:
        os.close(descriptor)
        raise KvmUnavailableError(f"{device} is not KVM: {error.strerror}", "use --simulated") from error
    if version != abi.API_VERSION:
        os.close(descriptor)
        raise KvmUnavailableError(f"{device} has API version {version}, not {abi.API_VERSION}", "use --simulated")
    return descriptor
