"""What an annotator is, and how the preload library is told. No I/O."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple, Self

from farfault_shim.annotate.event_format import EventFormat, EventFormatError

FIELD_SIZES_BYTES: Final = (4, 8)
FIELD_OFFSET_MAX: Final = 512
"""The preload library refuses a field further into the record (``real.c``)."""


class AddressKind(Enum):
    """Which address a tracepoint's field holds."""

    GPA = "gpa"
    GVA = "gva"
    """The vCPU translates it to a guest physical address with KVM_TRANSLATE."""


class Tracepoint(NamedTuple):
    """A KVM tracepoint that fires before a failed fault returns to the VMM, on the thread of the vCPU."""

    system: str
    event: str
    field: str
    kind: AddressKind

    def __str__(self) -> str:
        return f"{self.system}:{self.event}"


PAGE_FAULT: Final = Tracepoint("kvm", "kvm_page_fault", "fault_address", AddressKind.GPA)
"""arch/x86/kvm/trace.h: the GPA on hosts with EPT or NPT."""
PAGETABLE_WALK: Final = Tracepoint("kvmmmu", "kvm_mmu_pagetable_walk", "addr", AddressKind.GVA)
"""arch/x86/kvm/mmu/mmutrace.h: each walk of the guest's page tables, which shadow paging begins a fault with."""

TRACEPOINTS: Final = (PAGE_FAULT, PAGETABLE_WALK)


class Annotator(NamedTuple):
    """A tracepoint's field, as perf samples carry it.

    Attributes:
        kind: of the address.
        event_id: of the tracepoint; changes from boot to boot.
        offset: of the field in the raw record, in bytes.
        size: of the field, in bytes.
    """

    kind: AddressKind
    event_id: int
    offset: int
    size: int

    @classmethod
    def of_event(cls, tracepoint: Tracepoint, event: EventFormat) -> Self:
        """From a parsed ``format`` file.

        Raises:
            EventFormatError: it lacks the field, or the field cannot be an address.
        """
        field = event.field(tracepoint.field)
        if field.size not in FIELD_SIZES_BYTES or field.offset > FIELD_OFFSET_MAX:
            raise EventFormatError(
                f"{tracepoint}: field {field.name} of {field.size} bytes at {field.offset} cannot be an address"
            )
        return cls(tracepoint.kind, event.event_id, field.offset, field.size)

    def render(self) -> str:
        """The value of FARFAULT_ANNOTATOR: ``gva:ID:OFFSET:SIZE``."""
        return f"{self.kind.value}:{self.event_id}:{self.offset}:{self.size}"
