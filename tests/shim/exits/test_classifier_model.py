"""The classifier against a naive model, in any order of exits, page states and memslot changes."""

from __future__ import annotations

import errno

import hypothesis.strategies as st
from farfault_shim.attach.wire import AddressSource, Report, ReportKind, Slot
from farfault_shim.exits.classifier import (
    FAULT_PAGES_MAX,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_MEMORY_EXIT_FLAG_PRIVATE,
    Complete,
    Decision,
    Escalate,
    ExitClassifier,
    Fetch,
    PassOn,
    Retry,
    SlotTable,
)
from farfault_shim.layout import FlatOffset, Gpa, Layout
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, rule

PAGE = 4096
LAYOUT = Layout([(8 * PAGE, PAGE), (8 * PAGE, PAGE)])
RETRIES_MAX = 3
SLOTS = [
    Slot(0, 0, Gpa(0), 8 * PAGE, FlatOffset(0)),
    Slot(1, 0, Gpa(8 * PAGE), 4 * PAGE, FlatOffset(8 * PAGE)),
    Slot(2, 0, Gpa(64 * PAGE), 4 * PAGE, FlatOffset(12 * PAGE)),
    Slot(3, 0, Gpa(128 * PAGE), PAGE, FlatOffset(1 << 40)),
]


class ClassifierMachine(RuleBasedStateMachine):
    """Each exit is decided byte by byte in the model."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = list(SLOTS)
        self.present: set[int] = set()
        self.attempts: dict[int, dict[int, int]] = {}
        self.classifier = ExitClassifier(LAYOUT, lambda: SlotTable(self.slots), self, RETRIES_MAX)

    def is_present(self, page: int) -> bool:
        return page in self.present

    @rule(page=st.integers(0, LAYOUT.page_count - 1))
    def install(self, page: int) -> None:
        self.present.add(page)

    @rule(page=st.integers(0, LAYOUT.page_count - 1))
    def discard(self, page: int) -> None:
        self.present.discard(page)

    @rule(chosen=st.sets(st.sampled_from(range(4))))
    def change_slots(self, chosen: set[int]) -> None:
        self.slots = [SLOTS[index] for index in sorted(chosen)]

    @rule(
        vcpu=st.integers(0, 1),
        ret=st.sampled_from([0, -1, -1, -1]),
        err=st.sampled_from([errno.EFAULT] * 4 + [errno.EINTR, errno.EAGAIN, 133]),
        exit_reason=st.sampled_from([0, KVM_EXIT_MMIO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MEMORY_FAULT, 17]),
        flags=st.sampled_from([0, 0, 0, KVM_MEMORY_EXIT_FLAG_PRIVATE]),
        gpa=st.integers(0, 140 * PAGE) | st.integers(0, 13 * PAGE) | st.integers(0, (1 << 64) - 1),
        size=st.sampled_from([0, 1, PAGE, PAGE, 2 * PAGE, 5 * PAGE, 1 << 40]),
        source=st.sampled_from(AddressSource),
        mmio_len=st.sampled_from([0, 1, 4, 8, 9]),
    )
    def exit(
        self,
        vcpu: int,
        ret: int,
        err: int,
        exit_reason: int,
        flags: int,
        gpa: int,
        size: int,
        source: AddressSource,
        mmio_len: int,
    ) -> None:
        raw = Report(ReportKind.EXIT, vcpu, 0, source, ret, err, exit_reason, mmio_len, flags, gpa, size)
        decision = self.classifier.classify(raw)
        assert _shape(decision) == self._expected(raw)

    def _expected(self, raw: Report) -> object:
        if raw.ret == 0:
            if raw.exit_reason != KVM_EXIT_MMIO or not 1 <= raw.mmio_len <= 8:
                return "pass"
            absent = self._absent(raw.gpa, raw.mmio_len)
            if absent is None:
                return "pass"
            self.attempts.pop(raw.vcpu, None)
            return ("fetch", absent) if absent else "complete"
        if raw.err != errno.EFAULT:
            return "pass"
        sampled = raw.address_source in (
            AddressSource.TRACEPOINT_GVA,
            AddressSource.TRACEPOINT_GPA,
            AddressSource.DECODED,
        )
        annotated = raw.address_source is AddressSource.KVM_RUN and raw.exit_reason == KVM_EXIT_MEMORY_FAULT
        if not sampled and not annotated:
            return self._retry(raw.vcpu, -1)
        if annotated and (raw.flags or raw.size == 0 or raw.size > FAULT_PAGES_MAX * PAGE):
            return "pass"
        absent = self._absent(raw.gpa, raw.size if annotated else 1)
        if absent is None:
            return "pass"
        if absent:
            self.attempts.pop(raw.vcpu, None)
            return ("fetch", absent)
        return self._retry(raw.vcpu, raw.gpa // PAGE)

    def _retry(self, vcpu: int, where: int) -> str:
        attempts = self.attempts.setdefault(vcpu, {})
        attempts[where] = attempts.get(where, 0) + 1
        if attempts[where] > RETRIES_MAX:
            del attempts[where]
            return "escalate"
        return "retry"

    def _absent(self, gpa: int, size: int) -> list[int] | None:
        """Absent pages of a range, found address by address; None: not all of it is ours, or not one slot's."""
        pages: set[int] = set()
        owners = set()
        for address in {*range(gpa, gpa + size, PAGE), gpa + size - 1}:
            owner = next((s for s in self.slots if s.gpa <= address < s.gpa + s.size_bytes), None)
            if owner is None or owner.offset_bytes >= LAYOUT.size_bytes:
                return None
            owners.add(owner.id)
            pages.add((owner.offset_bytes + address - owner.gpa) // PAGE)
        return sorted(pages - self.present) if len(owners) == 1 else None


def _shape(decision: Decision) -> object:
    match decision:
        case Fetch(pages, _):
            return ("fetch", [page for run in pages for page in range(run.first, run.end)])
        case Retry():
            return "retry"
        case Complete():
            return "complete"
        case PassOn():
            return "pass"
        case Escalate():
            return "escalate"


ClassifierMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestClassifierMachine = ClassifierMachine.TestCase
