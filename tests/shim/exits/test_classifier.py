"""Every row of the table, from every source of an address, and each race."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest
from farfault_shim.attach.wire import AddressSource, Report, ReportKind, Slot
from farfault_shim.exits.classifier import (
    FAULT_PAGES_MAX,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    RETRIES_MAX,
    RETRY_ADDRESSES_MAX,
    RETRY_MEMORY_NS,
    Complete,
    Decision,
    Escalate,
    ExitClassifier,
    Fetch,
    PassOn,
    Retry,
    SlotTable,
    Then,
)
from farfault_shim.layout import FlatOffset, Gpa, Layout, PageIndex, PageRun

PAGE = 4096
HUGE = 2 << 20
EHWPOISON = 133
KVM_EXIT_INTERNAL_ERROR = 17
HOLE_GPA = 0x10_0000
"""Low RAM ends here; high RAM begins at 4 GiB."""
HIGH_GPA = 1 << 32
LAYOUT = Layout([(0x20_0000, PAGE), (4 * HUGE, HUGE)])
LOW = Slot(0, 0, Gpa(0), HOLE_GPA, FlatOffset(0))
HIGH = Slot(1, 0, Gpa(HIGH_GPA), HOLE_GPA, FlatOffset(HOLE_GPA))
BIG = Slot(2, 0, Gpa(2 << 32), 4 * HUGE, FlatOffset(0x20_0000))
FOREIGN = Slot(3, 0, Gpa(3 << 32), HUGE, FlatOffset(1 << 40))

WITH_ADDRESS = [
    AddressSource.KVM_RUN,
    AddressSource.TRACEPOINT_GVA,
    AddressSource.TRACEPOINT_GPA,
    AddressSource.DECODED,
]
GARBAGE = 0xDEAD_BEEF_F00D


class Pages:
    """Page states: which pages are present."""

    def __init__(self, present: Sequence[int] = ()) -> None:
        self.present = set(present)

    def is_present(self, page: int) -> bool:
        return page in self.present


class Host:
    """A classifier with the memslots and page states that a test changes under it."""

    def __init__(self, present: Sequence[int] = (), retries_max: int = RETRIES_MAX) -> None:
        self.slots = [LOW, HIGH, BIG, FOREIGN]
        self.pages = Pages(present)
        self.classifier = ExitClassifier(LAYOUT, lambda: SlotTable(self.slots), self.pages, retries_max)

    def exit(self, raw: Report) -> Decision:
        return self.classifier.classify(raw)


def fault(
    source: AddressSource = AddressSource.KVM_RUN,
    gpa: int = 0x3000,
    size: int = PAGE,
    *,
    flags: int = 0,
    vcpu: int = 0,
    exit_ns: int = 0,
) -> Report:
    """-EFAULT with an address."""
    reason = KVM_EXIT_MEMORY_FAULT if source is AddressSource.KVM_RUN else 0
    raw = Report(ReportKind.EXIT, vcpu, 0, source, -1, errno.EFAULT, reason, 0, flags, gpa, size, rip=0xFFFF)
    return raw._replace(exit_ns=exit_ns)


def bare(*, vcpu: int = 0, gpa: int = GARBAGE, exit_reason: int = 0, exit_ns: int = 0) -> Report:
    """-EFAULT without one; the union holds whatever it held."""
    return fault(AddressSource.NONE, gpa, 1 << 40, flags=0xFF, vcpu=vcpu, exit_ns=exit_ns)._replace(
        exit_reason=exit_reason
    )


def mmio(gpa: int, mmio_len: int = 4) -> Report:
    return Report(ReportKind.EXIT, 0, 0, AddressSource.MMIO, 0, 0, KVM_EXIT_MMIO, mmio_len, gpa=gpa, rip=0xFFFF)


def run(first: int, count: int = 1) -> PageRun:
    return PageRun(PageIndex(first), count)


# ---- row: a page of a known slot is absent --------------------------------------------------------


@pytest.mark.parametrize("source", WITH_ADDRESS)
@pytest.mark.parametrize("gpa", [0, 0x3000, 0x3FFF, HOLE_GPA - 1, HIGH_GPA, HIGH_GPA + HOLE_GPA - 1])
def test_an_absent_page_is_fetched(source: AddressSource, gpa: int) -> None:
    offset = gpa if gpa < HOLE_GPA else gpa - HIGH_GPA + HOLE_GPA
    aligned = gpa & -PAGE
    where = aligned if source is AddressSource.KVM_RUN else gpa  # KVM reports page by page, others the byte
    assert Host().exit(fault(source, where)) == Fetch((run(offset // PAGE),), Then.RETRY)


def test_every_absent_page_of_an_annotated_range_is_fetched_and_no_other() -> None:
    host = Host(present=[4, 5, 8])
    assert host.exit(fault(gpa=0x3000, size=7 * PAGE)) == Fetch((run(3), run(6, 2), run(9)), Then.RETRY)
    assert host.exit(fault(gpa=0x3FFF, size=2)) == Fetch((run(3),), Then.RETRY)


@pytest.mark.parametrize("source", WITH_ADDRESS[1:])
def test_the_size_of_an_annotator_is_not_believed(source: AddressSource) -> None:
    assert Host().exit(fault(source, 0x3ABC, size=1 << 60)) == Fetch((run(3),), Then.RETRY)
    assert Host().exit(fault(source, 0x3ABC, size=0)) == Fetch((run(3),), Then.RETRY)


def test_huge_pages_are_fetched_whole() -> None:
    first_big = LAYOUT.regions[1].first_page
    assert Host().exit(fault(gpa=BIG.gpa + HUGE + 5 * PAGE)) == Fetch((run(first_big + 1),), Then.RETRY)
    assert Host().exit(fault(gpa=BIG.gpa, size=HUGE)) == Fetch((run(first_big),), Then.RETRY)


# ---- row: every page is present -------------------------------------------------------------------


@pytest.mark.parametrize("source", WITH_ADDRESS)
def test_a_present_page_is_mapped_then_restarted_then_escalated(source: AddressSource) -> None:
    host = Host(present=[3])
    for _ in range(RETRIES_MAX):
        assert host.exit(fault(source, 0x3010, 16)) == Retry(Gpa(0x3000), PAGE)
    decision = host.exit(fault(source, 0x3010, 16))
    assert isinstance(decision, Escalate)
    for part in ("vCPU 0", "gpa 0x3010", "slot 0", "rip 0xffff", "page present", f"{RETRIES_MAX} attempts"):
        assert part in decision.log_line
    assert host.exit(fault(source, 0x3010, 16)) == Retry(Gpa(0x3000), PAGE), "the VMM may run the vCPU again"


def test_attempts_are_counted_by_vcpu_and_address() -> None:
    host = Host(present=[3, 4], retries_max=2)
    for _ in range(2):
        assert isinstance(host.exit(fault(vcpu=0)), Retry)
        assert isinstance(host.exit(fault(vcpu=1)), Retry)
        assert isinstance(host.exit(fault(vcpu=0, gpa=0x4000)), Retry)
    assert isinstance(host.exit(fault(vcpu=0)), Escalate)
    assert isinstance(host.exit(fault(vcpu=1)), Escalate)
    assert isinstance(host.exit(fault(vcpu=0, gpa=0x4000)), Escalate)


def test_faults_that_alternate_between_two_addresses_do_not_loop_for_ever() -> None:
    host = Host(present=range(32), retries_max=4)
    decisions = [host.exit(fault(gpa=0x1000 * (step % RETRY_ADDRESSES_MAX))) for step in range(100)]
    assert any(isinstance(decision, Escalate) for decision in decisions)


def test_addresses_remembered_are_bounded() -> None:
    host = Host(present=range(256))
    for page in range(256):
        assert isinstance(host.exit(fault(gpa=page * PAGE)), Retry)
    assert len(host.classifier._progress[0]) == RETRY_ADDRESSES_MAX


def test_a_page_that_is_reclaimed_now_and_then_is_no_loop() -> None:
    host = Host(present=[3], retries_max=2)
    for second in range(10):
        assert isinstance(host.exit(fault(exit_ns=second * (RETRY_MEMORY_NS + 1))), Retry)


def test_a_fetch_is_progress() -> None:
    host = Host(present=[3], retries_max=1)
    assert isinstance(host.exit(fault()), Retry)
    assert isinstance(host.exit(fault(gpa=0x9000)), Fetch)
    assert isinstance(host.exit(fault()), Retry)
    assert isinstance(host.exit(fault()), Escalate)


# ---- row: private flag, no slot, size 0, past its slot ---------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        fault(flags=KVM_MEMORY_EXIT_FLAG_PRIVATE),
        fault(flags=KVM_MEMORY_EXIT_FLAG_PRIVATE | 1),
        fault(size=0),
        fault(gpa=HOLE_GPA),
        fault(gpa=HIGH_GPA - PAGE),
        fault(gpa=HIGH_GPA + HOLE_GPA),
        fault(gpa=(1 << 64) - PAGE, size=2 * PAGE),
        fault(gpa=HOLE_GPA - PAGE, size=2 * PAGE),
        fault(gpa=0, size=1 << 63),
        fault(gpa=0, size=(1 << 64) - 1),
        fault(gpa=FOREIGN.gpa),
        *(fault(source, gpa=HOLE_GPA) for source in WITH_ADDRESS),
        *(fault(source, gpa=FOREIGN.gpa) for source in WITH_ADDRESS),
    ],
    ids=lambda raw: f"{raw.address_source.name}-{raw.gpa:#x}+{raw.size:#x}-{raw.flags}",
)
def test_somebody_elses_fault_and_nonsense_are_handed_on(raw: Report) -> None:
    assert isinstance(Host().exit(raw), PassOn)


def test_a_range_longer_than_a_fault_is_handed_on() -> None:
    host = Host()
    host.slots = [Slot(0, 0, Gpa(0), LAYOUT.size_bytes, FlatOffset(0))]
    limit = FAULT_PAGES_MAX * PAGE
    assert isinstance(host.exit(fault(gpa=0, size=limit)), Fetch)
    assert isinstance(host.exit(fault(gpa=0, size=limit + 1)), PassOn)
    assert isinstance(host.exit(fault(gpa=0x20_0000, size=limit + 1)), PassOn)


def test_the_private_flag_means_nothing_to_an_annotator() -> None:
    raw = fault(AddressSource.TRACEPOINT_GPA, flags=KVM_MEMORY_EXIT_FLAG_PRIVATE)
    assert isinstance(Host().exit(raw), Fetch)


# ---- row: bare EFAULT ------------------------------------------------------------------------------


@pytest.mark.parametrize("gpa", [0, 0x3000, GARBAGE, (1 << 64) - 1])
def test_a_bare_exit_is_retried_then_escalated_whatever_the_union_holds(gpa: int) -> None:
    host = Host()
    for _ in range(RETRIES_MAX):
        assert host.exit(bare(gpa=gpa)) == Retry(Gpa(0), 0)
    decision = host.exit(bare(gpa=gpa))
    assert isinstance(decision, Escalate)
    assert "address unknown" in decision.log_line
    assert f"{gpa:#x}" not in decision.log_line or gpa == 0


@pytest.mark.parametrize("reason", [0, KVM_EXIT_MMIO, KVM_EXIT_INTERNAL_ERROR])
def test_an_address_of_kvm_run_without_its_exit_reason_is_garbage(reason: int) -> None:
    assert Host().exit(fault()._replace(exit_reason=reason)) == Retry(Gpa(0), 0)


def test_an_mmio_address_of_a_failed_run_is_garbage() -> None:
    assert Host().exit(fault()._replace(address_source=AddressSource.MMIO)) == Retry(Gpa(0), 0)


def test_the_memslot_flag_being_set_while_a_vcpu_faults() -> None:
    """KVM gives one bare EFAULT, and the annotated exit after the restart."""
    host = Host()
    assert host.exit(bare()) == Retry(Gpa(0), 0)
    assert host.exit(fault()) == Fetch((run(3),), Then.RETRY)


# ---- row: MMIO in RAM ------------------------------------------------------------------------------


def test_an_emulated_access_to_an_absent_page_is_completed_after_its_fetch() -> None:
    host = Host()
    assert host.exit(mmio(0x3008)) == Fetch((run(3),), Then.COMPLETE_MMIO)
    host.pages.present = {3}
    assert host.exit(mmio(0x3008)) == Complete()


def test_an_emulated_access_across_two_pages_needs_both() -> None:
    assert Host().exit(mmio(0x3FFE)) == Fetch((run(3, 2),), Then.COMPLETE_MMIO)
    assert Host(present=[3]).exit(mmio(0x3FFE)) == Fetch((run(4),), Then.COMPLETE_MMIO)


@pytest.mark.parametrize(
    "raw",
    [mmio(HOLE_GPA), mmio(0xFEC0_0000), mmio(FOREIGN.gpa), mmio(HOLE_GPA - 2), mmio(0x3000, 0), mmio(0x3000, 9)],
)
def test_device_memory_is_the_vmms(raw: Report) -> None:
    assert isinstance(Host().exit(raw), PassOn)


# ---- rows: EHWPOISON, EINTR, EAGAIN, anything else ---------------------------------------------------


@pytest.mark.parametrize("error", [EHWPOISON, errno.EINTR, errno.EAGAIN, errno.EINVAL, errno.ENOMEM, 0, 9999])
@pytest.mark.parametrize("source", AddressSource)
def test_other_errors_are_handed_on_at_once(error: int, source: AddressSource) -> None:
    assert isinstance(Host().exit(fault(source)._replace(err=error)), PassOn)


@pytest.mark.parametrize("reason", [0, 2, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_MEMORY_FAULT, 4_000_000_000])
def test_other_exits_are_the_vmms(reason: int) -> None:
    assert isinstance(Host().exit(mmio(0x3000)._replace(exit_reason=reason)), PassOn)


# ---- races -------------------------------------------------------------------------------------------


def test_a_page_that_somebody_else_installed_meanwhile_is_only_mapped() -> None:
    host = Host()
    assert isinstance(host.exit(fault()), Fetch)
    host.pages.present = {3}
    assert host.exit(fault()) == Retry(Gpa(0x3000), PAGE)


def test_a_stale_annotation_names_a_present_page_and_is_bounded() -> None:
    """A lost sample leaves the address of an earlier fault; the real one follows after a restart."""
    host = Host(present=[3], retries_max=3)
    for _ in range(3):
        assert isinstance(host.exit(fault(AddressSource.TRACEPOINT_GPA, 0x3000)), Retry)
    assert host.exit(fault(AddressSource.TRACEPOINT_GPA, 0x5000)) == Fetch((run(5),), Then.RETRY)


def test_a_kick_while_a_fetch_waits_then_the_same_fault_again() -> None:
    host = Host()
    assert isinstance(host.exit(fault()), Fetch)
    assert isinstance(host.exit(fault()._replace(err=errno.EINTR)), PassOn)
    assert isinstance(host.exit(fault()), Fetch)


def test_a_slot_that_is_deleted_while_a_fetch_is_in_flight() -> None:
    host = Host()
    assert isinstance(host.exit(fault()), Fetch)
    host.slots = [HIGH]
    assert isinstance(host.exit(fault()), PassOn)


def test_a_slot_that_is_moved_while_a_fetch_is_in_flight() -> None:
    host = Host()
    assert host.exit(fault()) == Fetch((run(3),), Then.RETRY)
    host.slots = [LOW._replace(gpa=Gpa(0x2000))]
    assert host.exit(fault()) == Fetch((run(1),), Then.RETRY)


def test_a_range_across_two_adjacent_slots_is_handed_on() -> None:
    host = Host()
    host.slots = [LOW, HIGH._replace(gpa=Gpa(HOLE_GPA))]
    assert isinstance(host.exit(fault(gpa=HOLE_GPA - PAGE, size=2 * PAGE)), PassOn)
    assert isinstance(host.exit(fault(gpa=HOLE_GPA - PAGE, size=PAGE)), Fetch)


def test_a_slot_partly_outside_of_the_memory() -> None:
    host = Host()
    host.slots = [Slot(0, 0, Gpa(0), 2 * LAYOUT.size_bytes, FlatOffset(LAYOUT.size_bytes - PAGE))]
    assert isinstance(host.exit(fault(gpa=0)), Fetch)
    assert isinstance(host.exit(fault(gpa=0, size=2 * PAGE)), PassOn)


# ---- around ------------------------------------------------------------------------------------------


def test_slots_are_found_by_address() -> None:
    table = SlotTable([HIGH, LOW])
    assert table.slot_of(0) == LOW
    assert table.slot_of(HOLE_GPA - 1) == LOW
    assert table.slot_of(HOLE_GPA) is None
    assert table.slot_of(-1) is None
    assert table.offset_of(HIGH_GPA + 5) == HOLE_GPA + 5
    assert table.offset_of(HIGH_GPA - 1) is None
    assert SlotTable([]).slot_of(0) is None
