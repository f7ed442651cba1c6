"""The tracepoint format parser: real files, other orders and sizes, nonsense."""

from __future__ import annotations

import pytest
from farfault_shim.annotate.annotator import PAGE_FAULT, PAGETABLE_WALK, AddressKind, Annotator
from farfault_shim.annotate.event_format import FORMAT_BYTES_MAX, EventField, EventFormat, EventFormatError

COMMON = """\
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

"""
LINUX_6_18_PAGE_FAULT = f"""\
name: kvm_page_fault
ID: 100
format:
{COMMON}\tfield:unsigned int vcpu_id;\toffset:8;\tsize:4;\tsigned:0;
\tfield:unsigned long guest_rip;\toffset:16;\tsize:8;\tsigned:0;
\tfield:u64 fault_address;\toffset:24;\tsize:8;\tsigned:0;
\tfield:u64 error_code;\toffset:32;\tsize:8;\tsigned:0;

print fmt: "vcpu %u rip 0x%lx address 0x%016llx error_code 0x%llx", REC->vcpu_id, REC->guest_rip, REC->fault_address
"""
LINUX_5_4_PAGE_FAULT = f"""\
name: kvm_page_fault
ID: 2077
format:
{COMMON}\tfield:unsigned long fault_address;\toffset:8;\tsize:8;\tsigned:0;
\tfield:unsigned int error_code;\toffset:16;\tsize:4;\tsigned:0;

print fmt: "address %lx error_code %x", REC->fault_address, REC->error_code
"""
PAGETABLE_WALK_32_BIT = f"""\
name: kvm_mmu_pagetable_walk
ID: 7
format:
{COMMON}\tfield:__u32 pferr;\toffset:8;\tsize:4;\tsigned:0;
\tfield:char comm[16];\toffset:12;\tsize:16;\tsigned:1;
\tfield:__data_loc char[] name;\toffset:28;\tsize:4;\tsigned:1;
\tfield:__u32 addr;\toffset:32;\tsize:4;\tsigned:0;

print fmt: "addr %x pferr %x", REC->addr, REC->pferr
"""


@pytest.mark.parametrize(
    ("text", "tracepoint", "expected"),
    [
        (LINUX_6_18_PAGE_FAULT, PAGE_FAULT, Annotator(AddressKind.GPA, 100, 24, 8)),
        (LINUX_5_4_PAGE_FAULT, PAGE_FAULT, Annotator(AddressKind.GPA, 2077, 8, 8)),
        (PAGETABLE_WALK_32_BIT, PAGETABLE_WALK, Annotator(AddressKind.GVA, 7, 32, 4)),
    ],
)
def test_the_field_is_found_wherever_it_lies(text: str, tracepoint: object, expected: Annotator) -> None:
    assert Annotator.of_event(tracepoint, EventFormat.parse(text)) == expected  # type: ignore[arg-type]


def test_arrays_and_dynamic_fields_are_read() -> None:
    event = EventFormat.parse(PAGETABLE_WALK_32_BIT)
    assert event.field("comm") == EventField("comm", 12, 16)
    assert event.field("name") == EventField("name", 28, 4)
    assert [field.name for field in event.fields[:2]] == ["common_type", "common_flags"]


def test_a_missing_field_is_named_with_those_that_are_there() -> None:
    with pytest.raises(EventFormatError, match=r"kvm_mmu_pagetable_walk has no field fault_address; it has .*pferr"):
        Annotator.of_event(PAGE_FAULT, EventFormat.parse(PAGETABLE_WALK_32_BIT))


@pytest.mark.parametrize("damage", [("offset:24;", "offset:600;"), ("offset:24;\tsize:8", "offset:24;\tsize:2")])
def test_a_field_that_cannot_be_an_address_is_refused(damage: tuple[str, str]) -> None:
    with pytest.raises(EventFormatError, match="cannot be an address"):
        Annotator.of_event(PAGE_FAULT, EventFormat.parse(LINUX_6_18_PAGE_FAULT.replace(*damage)))


@pytest.mark.parametrize("text", ["", "name: x\nformat:\n", "ID: 1\nname: x\n", "\n" * (FORMAT_BYTES_MAX + 1)])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(EventFormatError):
        EventFormat.parse(text)


def test_rendering_is_what_the_library_reads() -> None:
    assert Annotator(AddressKind.GVA, 133, 8, 8).render() == "gva:133:8:8"
    assert Annotator(AddressKind.GPA, 100, 24, 8).render() == "gpa:100:24:8"
