"""What lies on the attach socket, byte for byte. No I/O.

The structs are those of ``vmm_shim/preload/farfault_attach.h``; a test compares sizes and offsets with the
header. The header tells which message travels when.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Final, NamedTuple, Self

from farfault_shim.layout import PAGE_SIZES_BYTES, FlatOffset, Gpa, Layout

VERSION: Final = 1
HANDOVER_BYTES_MAX: Final = 65536
REGIONS_MAX: Final = 64
SLOTS_MAX: Final = 512
VCPUS_MAX: Final = 1024
FRAME_BYTES_MAX: Final = 4096
ADDRESS_MAX: Final = 1 << 63
"""No user address is beyond it."""

REPORT_MAGIC: Final = 0x31524646
VERDICT_MAGIC: Final = 0x31564646
STATE_MAGIC: Final = 0x31534646

PARAVIRTUAL_MSRS: Final = (
    *(0x4B564D00, 0x4B564D01, 0x4B564D02, 0x4B564D03, 0x4B564D04, 0x11),
    *(0x12, 0x40000021, 0x40000073, 0x40000083, 0x40000082, 0x40000001),
)
"""MSRs whose value names a guest page that KVM itself writes; bit 0 says that it is on."""

FRAME: Final = struct.Struct("<II")
VCPU_HELLO: Final = struct.Struct("<II")
REPORT: Final = struct.Struct("<IHHIIiiIIQQQQQQIIQQQQ12Q")
_REPORT_HEAD: Final = struct.Struct("<IHHIIiiIIQQQQQQII")
_REPORT_TAIL: Final = struct.Struct("<QQQQ12Q")
"""Registers and MSRs: only a START has values there."""
VERDICT: Final = struct.Struct("<IIIIQQ")
STATE_HEAD: Final = struct.Struct("<IIIII44x")
SLOT: Final = struct.Struct("<IIQQQ")
VCPU_COUNTERS: Final = struct.Struct("<QQQQQQQII")
STATE_BYTES: Final = STATE_HEAD.size + SLOTS_MAX * SLOT.size + VCPUS_MAX * VCPU_COUNTERS.size
SLOTS_SEQ_OFFSET: Final = 12
"""Of ``slots_seq`` in the state area: odd while the slots change."""


class ProtocolError(Exception):
    """The peer sent something that the attach protocol does not allow."""


class FrameType(IntEnum):
    """Type of a frame on the attach socket."""

    VCPU = 1
    RELEASED = 2
    READY = 3
    REFUSED = 4


class ReportKind(IntEnum):
    """Why a vCPU asks for a verdict."""

    EXIT = 1
    START = 2


class AddressSource(IntEnum):
    """Where the address of a report came from."""

    NONE = 0
    KVM_RUN = 1
    TRACEPOINT_GVA = 2
    TRACEPOINT_GPA = 3
    MMIO = 4
    DECODED = 5


class VerdictKind(IntEnum):
    """What a vCPU does next."""

    RETRY = 1
    PASS = 2
    COMPLETE = 3


VERDICT_POPULATE: Final = 1
"""Verdict flag: first make ``[gpa, gpa + size)`` present with MADV_POPULATE_WRITE."""


class FaultSource(Enum):
    """How the VMM's vCPUs miss pages."""

    STOCK_NOWAIT = "stock-nowait"
    KERNEL_NOWAIT = "kernel-nowait"
    BLOCKING = "blocking"
    SIMULATED = "simulated"


class VcpuHello(NamedTuple):
    """Announces a vCPU; its SOCK_SEQPACKET descriptor travels along."""

    vcpu: int
    thread_id: int


class Report(NamedTuple):
    """A vCPU's raw exit, as the shim saw it.

    Attributes:
        ret, err: what KVM_RUN returned, and errno where that is -1.
        exit_reason: of struct kvm_run; 0: untouched.
        flags, gpa, size: memory_fault's, or what the annotator found (`size` 0: unknown).
        exit_ns: when it ended, CLOCK_MONOTONIC.
        cr0, cr3, cr4, efer, msrs: of a START; 0 otherwise.
    """

    kind: ReportKind
    vcpu: int
    seq: int
    address_source: AddressSource = AddressSource.NONE
    ret: int = 0
    err: int = 0
    exit_reason: int = 0
    mmio_len: int = 0
    flags: int = 0
    gpa: int = 0
    size: int = 0
    gva: int = 0
    rip: int = 0
    exit_ns: int = 0
    mmio_is_write: bool = False
    translate_failed: bool = False
    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    msrs: tuple[int, ...] = (0,) * len(PARAVIRTUAL_MSRS)

    def pack(self) -> bytes:
        return REPORT.pack(
            REPORT_MAGIC,
            self.kind,
            self.address_source,
            self.vcpu,
            self.seq,
            self.ret,
            self.err,
            self.exit_reason,
            self.mmio_len,
            self.flags,
            self.gpa,
            self.size,
            self.gva,
            self.rip,
            self.exit_ns,
            self.mmio_is_write,
            self.translate_failed,
            self.cr0,
            self.cr3,
            self.cr4,
            self.efer,
            *self.msrs,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Report:
        """Raises ProtocolError for a wrong size, magic or enum value."""
        if len(data) != REPORT.size:
            raise ProtocolError(f"a report of {len(data)} bytes instead of {REPORT.size}")
        magic, kind, source, vcpu, seq, *scalars, is_write, translate_failed = _REPORT_HEAD.unpack_from(data)
        if magic != REPORT_MAGIC:
            raise ProtocolError(f"report magic {magic:#x}")
        report_kind, address_source = _REPORT_KINDS.get(kind), _ADDRESS_SOURCES.get(source)
        if report_kind is None or address_source is None:
            wrong = (
                f"{kind} is not a valid ReportKind" if report_kind is None else f"{source} is not a valid AddressSource"
            )
            raise ProtocolError(wrong)
        if vcpu >= VCPUS_MAX:
            raise ProtocolError(f"vCPU {vcpu}, more than {VCPUS_MAX}")
        fields = (report_kind, vcpu, seq, address_source, *scalars, bool(is_write), bool(translate_failed))
        if report_kind is ReportKind.EXIT:
            return cls._make((*fields, *_NO_REGISTERS))
        cr0, cr3, cr4, efer, *msrs = _REPORT_TAIL.unpack_from(data, _REPORT_HEAD.size)
        return cls._make((*fields, cr0, cr3, cr4, efer, tuple(msrs)))


_NO_REGISTERS: Final = (0, 0, 0, 0, (0,) * len(PARAVIRTUAL_MSRS))
_REPORT_KINDS: Final = {int(kind): kind for kind in ReportKind}
_ADDRESS_SOURCES: Final = {int(source): source for source in AddressSource}


class Verdict(NamedTuple):
    """The answer to the report with the same `seq`."""

    seq: int
    verdict: VerdictKind
    flags: int = 0
    gpa: int = 0
    size: int = 0

    def pack(self) -> bytes:
        return VERDICT.pack(VERDICT_MAGIC, self.seq, self.verdict, self.flags, self.gpa, self.size)

    @classmethod
    def unpack(cls, data: bytes) -> Verdict:
        """Raises ProtocolError for a wrong size, magic or enum value."""
        if len(data) != VERDICT.size:
            raise ProtocolError(f"a verdict of {len(data)} bytes instead of {VERDICT.size}")
        magic, seq, kind, flags, gpa, size = VERDICT.unpack(data)
        if magic != VERDICT_MAGIC or kind not in VerdictKind.__members__.values():
            raise ProtocolError(f"verdict magic {magic:#x}, kind {kind}")
        return cls(seq, VerdictKind(kind), flags, gpa, size)


class Slot(NamedTuple):
    """A memslot: guest physical memory ``[gpa, gpa + size)`` at a flat offset."""

    id: int
    flags: int
    gpa: Gpa
    size_bytes: int
    offset_bytes: FlatOffset


class VcpuCounters(NamedTuple):
    """What one vCPU of the VMM has seen; durations in nanoseconds."""

    exits_annotated: int
    exits_bare: int
    exits_mmio: int
    passed: int
    kicks: int
    blocked_ns: int
    lost_samples: int
    thread_id: int
    waiting: int


class HandOverRegion(NamedTuple):
    """One region of a hand-over; addresses are of the VMM's process, `alias_hva` is 0 where there is none."""

    base_hva: int
    alias_hva: int
    size_bytes: int
    offset_bytes: int
    page_size_bytes: int


@dataclass(frozen=True, slots=True)
class HandOver:
    """A VMM's hand-over.

    Attributes:
        regions: in the order of their flat offsets.
        fault_source: of its vCPUs.
        descriptors: the names of the descriptors that travel along, in order.
        is_plain: a Firecracker-style VMM without our extension.
    """

    regions: tuple[HandOverRegion, ...]
    fault_source: FaultSource
    descriptors: tuple[str, ...]
    is_plain: bool = False

    def layout(self) -> Layout:
        """The regions as a layout."""
        return Layout((region.size_bytes, region.page_size_bytes) for region in self.regions)

    def pack(self) -> bytes:
        """The JSON that goes on the wire."""
        objects: list[dict[str, Any]] = [
            {
                "base_host_virt_addr": region.base_hva,
                "size": region.size_bytes,
                "offset": region.offset_bytes,
                "page_size": region.page_size_bytes,
                "page_size_kib": region.page_size_bytes,  # Firecracker's misnomer: it holds bytes
            }
            | ({} if self.is_plain else {"alias_host_virt_addr": region.alias_hva})
            for region in self.regions
        ]
        if not self.is_plain:
            extension = {
                "version": VERSION,
                "fault_source": self.fault_source.value,
                "fds": list(self.descriptors),
            }
            objects[0]["farfault"] = extension
        return json.dumps(objects).encode()

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads a hand-over.

        Raises:
            ProtocolError: not the JSON array that it must be, or regions that do not lie end to end.
        """
        try:
            objects: list[dict[str, Any]] = json.loads(data)
            if not isinstance(objects, list) or not 1 <= len(objects) <= REGIONS_MAX:
                raise ProtocolError(f"a hand-over is an array of 1 to {REGIONS_MAX} regions")
            regions = tuple(sorted((_region(item) for item in objects), key=lambda region: region.offset_bytes))
            extension = objects[0].get("farfault")
            if extension is None:
                handover = cls(regions, FaultSource.BLOCKING, ("uffd",), is_plain=True)
            else:
                if extension["version"] != VERSION:
                    raise ProtocolError(
                        f"attach protocol version {extension['version']}, this receiver speaks {VERSION}"
                    )
                names = tuple(str(name) for name in extension["fds"])
                handover = cls(regions, FaultSource(extension["fault_source"]), names)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError(f"malformed hand-over: {error!r}") from None
        if len(set(handover.descriptors)) != len(handover.descriptors):
            raise ProtocolError("two descriptors of one name")
        _check_end_to_end(regions)
        return handover


def _region(item: dict[str, Any]) -> HandOverRegion:
    page_size_bytes = int(item.get("page_size") or item.get("page_size_kib") or 4096)
    if page_size_bytes not in PAGE_SIZES_BYTES:
        raise ProtocolError(f"page size {page_size_bytes}")
    region = HandOverRegion(
        int(item["base_host_virt_addr"]),
        int(item.get("alias_host_virt_addr", 0)),
        int(item["size"]),
        int(item["offset"]),
        page_size_bytes,
    )
    if region.size_bytes <= 0 or region.size_bytes % page_size_bytes:
        raise ProtocolError(f"region at {region.base_hva:#x} of {region.size_bytes} bytes is not whole pages")
    for address in (region.base_hva, region.alias_hva):
        if address % page_size_bytes or not 0 <= address <= ADDRESS_MAX - region.size_bytes:
            raise ProtocolError(f"region at {address:#x} of {region.size_bytes} bytes is no user memory of whole pages")
    return region


def _check_end_to_end(regions: Sequence[HandOverRegion]) -> None:
    expected = 0
    for region in regions:
        if region.offset_bytes != expected:
            raise ProtocolError(f"a region begins at offset {region.offset_bytes:#x} instead of {expected:#x}")
        expected += region.size_bytes
