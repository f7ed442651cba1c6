"""The shared page of a vCPU, struct kvm_run, byte for byte as the kernel lays it out. No I/O."""

from __future__ import annotations

import struct
from mmap import mmap
from typing import Final, NamedTuple

from farfault_shim.kvm import abi

_U32: Final = struct.Struct("<I")
MMIO_BYTES_MAX: Final = 8


class Mmio(NamedTuple):
    """An access that KVM left to the VMM."""

    gpa: int
    data: bytes
    size_bytes: int
    is_write: bool


class MemoryFault(NamedTuple):
    """KVM_EXIT_MEMORY_FAULT's account of a failed access."""

    flags: int
    gpa: int
    size_bytes: int


class RunArea:
    """struct kvm_run.

    Args:
        memory: the mapping of a vCPU's descriptor, or a buffer that plays it.
    """

    def __init__(self, memory: mmap | bytearray) -> None:
        self._memory = memory

    @property
    def exit_reason(self) -> int:
        return int(_U32.unpack_from(self._memory, abi.RUN_EXIT_REASON)[0])

    @exit_reason.setter
    def exit_reason(self, value: int) -> None:
        _U32.pack_into(self._memory, abi.RUN_EXIT_REASON, value)

    @property
    def immediate_exit(self) -> bool:
        """KVM_RUN returns -EINTR at once while this is set (KVM_CAP_IMMEDIATE_EXIT)."""
        return self._memory[abi.RUN_IMMEDIATE_EXIT] != 0

    @immediate_exit.setter
    def immediate_exit(self, value: bool) -> None:
        self._memory[abi.RUN_IMMEDIATE_EXIT] = value

    @property
    def mmio(self) -> Mmio:
        """Means something after KVM_EXIT_MMIO only."""
        gpa, data, size_bytes, is_write = abi.RUN_MMIO.unpack_from(self._memory, abi.RUN_UNION)
        return Mmio(gpa, data[: min(size_bytes, MMIO_BYTES_MAX)], size_bytes, bool(is_write))

    @mmio.setter
    def mmio(self, value: Mmio) -> None:
        abi.RUN_MMIO.pack_into(self._memory, abi.RUN_UNION, value.gpa, value.data, value.size_bytes, value.is_write)

    def answer_mmio(self, data: bytes) -> None:
        """What a read gets when KVM_RUN is called again; at most 8 bytes."""
        assert len(data) <= MMIO_BYTES_MAX
        self._memory[abi.RUN_MMIO_DATA : abi.RUN_MMIO_DATA + len(data)] = data

    @property
    def memory_fault(self) -> MemoryFault:
        """Means something after KVM_EXIT_MEMORY_FAULT only."""
        return MemoryFault(*abi.RUN_MEMORY_FAULT.unpack_from(self._memory, abi.RUN_UNION))

    @memory_fault.setter
    def memory_fault(self, value: MemoryFault) -> None:
        abi.RUN_MEMORY_FAULT.pack_into(self._memory, abi.RUN_UNION, *value)

    def fill_union(self, data: bytes) -> None:
        """Overwrites the front of the union: garbage, for the simulated KVM."""
        assert len(data) <= abi.RUN_UNION_BYTES
        self._memory[abi.RUN_UNION : abi.RUN_UNION + len(data)] = data
