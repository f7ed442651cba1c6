"""The device state of a VM as bytes: everything but RAM. No I/O.

``FFVMST``, version (u16), length of the body (u64), body (JSON, UTF-8), XXH3-64 of all that precedes (u64);
integers little-endian.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import xxhash
from farfault_cli.errors import FarfaultError

MAGIC: Final = b"FFVMST"
VERSION: Final = 1
STATE_BYTES_MAX: Final = 64 << 20
_HEAD: Final = struct.Struct("<6sHQ")
_DIGEST: Final = struct.Struct("<Q")


class SavedStateError(FarfaultError):
    """Bytes that are no state, or the state of a VM that does not fit."""


@dataclass(frozen=True, slots=True)
class VcpuState:
    """One vCPU: kvm_regs, kvm_sregs and kvm_xsave as KVM gave them, and MSRs by index."""

    registers: bytes
    special: bytes
    xsave: bytes
    msrs: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class SavedState:
    """A stopped VM.

    Attributes:
        kind: of KVM, ``kvm`` or ``simulated``.
        machine: how RAM is split: ``pc``, ``q35`` or ``flat``.
        ram_bytes: of RAM.
        clock_ns: kvmclock's time at the stop.
        vcpus: in the order of their numbers.
    """

    kind: str
    machine: str
    ram_bytes: int
    clock_ns: int
    vcpus: tuple[VcpuState, ...]

    def pack(self) -> bytes:
        body = json.dumps(
            {
                "kind": self.kind,
                "machine": self.machine,
                "ram_bytes": self.ram_bytes,
                "clock_ns": self.clock_ns,
                "vcpus": [
                    {
                        "registers": vcpu.registers.hex(),
                        "special": vcpu.special.hex(),
                        "xsave": vcpu.xsave.hex(),
                        "msrs": {f"{index:#x}": value for index, value in vcpu.msrs.items()},
                    }
                    for vcpu in self.vcpus
                ],
            }
        ).encode()
        covered = _HEAD.pack(MAGIC, VERSION, len(body)) + body
        return covered + _DIGEST.pack(xxhash.xxh3_64_intdigest(covered))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Reads a state.

        Raises:
            SavedStateError: cut short, damaged, of another version, or something else altogether.
        """
        body = _checked_body(data)
        try:
            values: dict[str, Any] = json.loads(body)
            vcpus = tuple(
                VcpuState(
                    bytes.fromhex(vcpu["registers"]),
                    bytes.fromhex(vcpu["special"]),
                    bytes.fromhex(vcpu["xsave"]),
                    {int(index, 16): int(value) for index, value in vcpu["msrs"].items()},
                )
                for vcpu in values["vcpus"]
            )
            numbers = int(values["ram_bytes"]), int(values["clock_ns"])
            return cls(str(values["kind"]), str(values["machine"]), *numbers, vcpus)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SavedStateError(f"device state with a malformed body: {error!r}") from None

    def check_fits(self, kind: str, machine: str, ram_bytes: int, vcpus: int) -> None:
        """Raises SavedStateError naming the first difference to the VM that is to load this."""
        pairs = {
            "KVM": (self.kind, kind),
            "machine": (self.machine, machine),
            "RAM in bytes": (self.ram_bytes, ram_bytes),
            "number of vCPUs": (len(self.vcpus), vcpus),
        }
        for what, (theirs, ours) in pairs.items():
            if theirs != ours:
                raise SavedStateError(
                    f"the state is of a VM with another {what}: {theirs}, this VM has {ours}",
                    "start both with the same options",
                )


def _checked_body(data: bytes) -> bytes:
    if len(data) < _HEAD.size + _DIGEST.size:
        raise SavedStateError(f"a device state of {len(data)} bytes is cut short", "was the source's connection lost?")
    magic, version, length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise SavedStateError("this is not the device state of a reference VMM", "is the source another VMM?")
    if version != VERSION:
        raise SavedStateError(f"device state version {version}, this VMM knows {VERSION}", "use the same farfault")
    if len(data) != _HEAD.size + length + _DIGEST.size:
        raise SavedStateError(f"a device state of {len(data)} bytes with a body of {length}", "it was cut short")
    if _DIGEST.unpack_from(data, len(data) - _DIGEST.size)[0] != xxhash.xxh3_64_intdigest(data[: -_DIGEST.size]):
        raise SavedStateError("the device state is damaged: its XXH3 digest is another", "move the VM again")
    return data[_HEAD.size : -_DIGEST.size]
