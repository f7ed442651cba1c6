"""Everything that ``farfault probe`` looks at, as plain items."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple

from farfault_cli.python_build import python_build

from farfault_shim.kvm import abi
from farfault_shim.kvm.nowait import NowaitInterface
from farfault_shim.probe.host_memory import find_memory
from farfault_shim.probe.vmms import find_vmms
from farfault_shim.sources.choose import AUTO, Choice, choose
from farfault_shim.sources.facts import Finding, HostFacts, KvmAccess, Paging
from farfault_shim.sources.hazards import Hazard, hazards
from farfault_shim.sources.host import find_host_facts
from farfault_shim.sources.userfault import FEATURES, UserfaultfdFacts, find_userfaultfd

CAPABILITIES: Final = {
    "KVM_CAP_USER_MEMORY2": abi.CAP_USER_MEMORY2,
    "KVM_CAP_MEMORY_FAULT_INFO": abi.CAP_MEMORY_FAULT_INFO,
    "KVM_CAP_MEMORY_ATTRIBUTES": abi.CAP_MEMORY_ATTRIBUTES,
    "KVM_CAP_GUEST_MEMFD": abi.CAP_GUEST_MEMFD,
    "KVM_CAP_IMMEDIATE_EXIT": abi.CAP_IMMEDIATE_EXIT,
    "KVM_CAP_NR_MEMSLOTS": abi.CAP_NR_MEMSLOTS,
    "KVM_CAP_MAX_VCPUS": abi.CAP_MAX_VCPUS,
}
NEEDED_CAPABILITIES: Final = frozenset({"KVM_CAP_IMMEDIATE_EXIT"})


class State(Enum):
    """Of an item."""

    OK = "ok"
    MISSING = "missing"
    OPTIONAL = "optional"
    """Not there, and nothing needs it."""


class Item(NamedTuple):
    """One line of the report."""

    section: str
    name: str
    state: State
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Survey:
    """A host.

    Attributes:
        items: what was looked at, in the order of the report.
        facts: on which the choice rests.
        choice: the fault source that would be used; its source is None where none works.
        hazards: pages that KVM itself touches, with that source; empty without one.
    """

    items: tuple[Item, ...]
    facts: HostFacts
    choice: Choice
    hazards: tuple[Hazard, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data; the names are stable."""
        source = self.choice.source
        annotator = self.choice.annotator
        return {
            "fault_source": None if source is None else source.value,
            "annotator": None if annotator is None else annotator.render(),
            "paging": self.facts.paging.value,
            "candidates": [
                {
                    "fault_source": verdict.source.value,
                    "chosen": verdict.source is source,
                    "works": verdict.works,
                    "reason": verdict.reason,
                    "remedy": verdict.remedy,
                }
                for verdict in self.choice.verdicts
            ],
            "hazards": [hazard._asdict() for hazard in self.hazards],
            "items": [item._asdict() | {"state": item.state.value} for item in self.items],
        }


def survey(
    interfaces: Sequence[NowaitInterface] = (), wish: str = AUTO, userfaultfd_device_fd: int | None = None
) -> Survey:
    """Looks at this host. Takes well under a second; nothing is changed.

    Args:
        interfaces: kernel NOWAIT interfaces to try.
        wish: the fault source that the user wants, or ``auto``.
        userfaultfd_device_fd: an inherited descriptor of ``/dev/userfaultfd``.

    Raises:
        FaultSourceUnavailableError: the wish cannot be fulfilled.
    """
    userfaultfd = find_userfaultfd(userfaultfd_device_fd)
    facts = find_host_facts(interfaces, userfaultfd, userfaultfd_device_fd)
    choice = choose(facts, wish)
    items = (
        *_kvm_items(facts),
        *_userfaultfd_items(userfaultfd),
        *_annotator_items(facts),
        *(Item("memory", name, *_optional(finding)) for name, finding in find_memory()),
        *(Item("VMMs", name, *_optional(finding)) for name, finding in find_vmms()),
        _python_item(),
    )
    found = () if choice.source is None else hazards(choice.source, facts.paging)
    return Survey(items, facts, choice, found)


def _required(finding: Finding) -> tuple[State, str, str]:
    return (State.OK if finding.ok else State.MISSING, finding.detail, finding.remedy)


def _optional(finding: Finding) -> tuple[State, str, str]:
    return (State.OK if finding.ok else State.OPTIONAL, finding.detail, finding.remedy)


def _python_item() -> Item:
    build = python_build()
    if build.is_optimised:
        return Item("Python", "build", State.OK, build.text)
    remedy = "each fault takes up to a fifth longer than with the distribution's Python: install farfault with that"
    return Item("Python", "build", State.OPTIONAL, build.text, remedy)


def _kvm_items(facts: HostFacts) -> Iterable[Item]:
    yield Item("KVM", "access", *_required(facts.kvm_finding))
    if facts.kvm is not KvmAccess.USABLE:
        return
    known = facts.paging is not Paging.UNKNOWN
    yield Item("KVM", "paging", State.OK if known else State.MISSING, facts.paging.value)
    for name, value in _capabilities().items():
        state = State.OK if value else State.MISSING if name in NEEDED_CAPABILITIES else State.OPTIONAL
        yield Item("KVM", name, state, str(value) if value else "not reported")
    if facts.stock_exit is not None:
        yield Item("KVM", "absent page, SIGBUS userfaultfd", *_required(facts.stock_exit))
    for trial in facts.kernel_trials:
        yield Item("KVM", trial.interface.series.value, *_optional(trial.result))


def _capabilities() -> dict[str, int]:
    descriptor = os.open(abi.DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return {name: fcntl.ioctl(descriptor, abi.CHECK_EXTENSION, number) for name, number in CAPABILITIES.items()}
    finally:
        os.close(descriptor)


def _userfaultfd_items(facts: UserfaultfdFacts) -> Iterable[Item]:
    """One of the two ways is enough, so that the other is optional."""
    judge = _optional if facts.permitted else _required
    yield Item("userfaultfd", "system call", *judge(facts.system_call))
    yield Item("userfaultfd", "/dev/userfaultfd", *judge(facts.device))
    setting = facts.unprivileged_setting
    state = State.OK if setting == "1" else State.OPTIONAL
    yield Item("userfaultfd", "vm.unprivileged_userfaultfd", state, setting or "the kernel has no such setting")
    if not facts.permitted:
        return
    absent = [name for name in FEATURES if name not in facts.features]
    yield Item("userfaultfd", "features", State.OK, ", ".join(name for name in FEATURES if name in facts.features))
    if absent:
        lacks = not facts.usable.ok or not facts.sigbus.ok
        yield Item("userfaultfd", "missing features", State.MISSING if lacks else State.OPTIONAL, ", ".join(absent))


def _annotator_items(facts: HostFacts) -> Iterable[Item]:
    """The tracepoint that fits the host's paging is needed for stock NOWAIT, the other is not."""
    for kind, found in facts.annotators.items():
        if found.annotator is not None:
            detail = f"event {found.annotator.event_id}, {found.tracepoint.field} at {found.annotator.offset}"
            yield Item("tracepoints", str(found.tracepoint), State.OK, detail)
            continue
        needed = kind is facts.paging.address_kind
        state = State.MISSING if needed else State.OPTIONAL
        yield Item("tracepoints", str(found.tracepoint), state, found.problem, found.remedy)
