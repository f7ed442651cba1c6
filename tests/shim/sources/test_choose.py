"""The choice of a fault source: every row of the policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from farfault_shim.annotate import AddressKind, Annotator, Discovery
from farfault_shim.annotate.annotator import PAGE_FAULT, PAGETABLE_WALK
from farfault_shim.attach.wire import FaultSource
from farfault_shim.kvm.nowait import EXIT_ON_MISSING
from farfault_shim.sources import (
    REAL_SOURCES,
    FaultSourceUnavailableError,
    Finding,
    HostFacts,
    KernelTrial,
    KvmAccess,
    Paging,
    choose,
)

GPA = Annotator(AddressKind.GPA, 100, 24, 8)
GVA = Annotator(AddressKind.GVA, 133, 8, 8)
EPT_HOST = HostFacts(
    KvmAccess.USABLE,
    Finding(True, "/dev/kvm"),
    Paging.TWO_DIMENSIONAL,
    Finding(True, "system call"),
    Finding(True, "UFFD_FEATURE_SIGBUS"),
    {AddressKind.GPA: Discovery(PAGE_FAULT, GPA), AddressKind.GVA: Discovery(PAGETABLE_WALK, GVA)},
    Finding(True, "48 bare -EFAULT exits, 48 addresses right"),
)
SHADOW_HOST = replace(EPT_HOST, paging=Paging.SHADOW)
NO_KVM = replace(
    EPT_HOST, kvm=KvmAccess.ABSENT, kvm_finding=Finding(False, "/dev/kvm is missing", "modprobe"), stock_exit=None
)
NO_PERF = {
    AddressKind.GPA: Discovery(PAGE_FAULT, None, "not permitted", "CAP_PERFMON"),
    AddressKind.GVA: Discovery(PAGETABLE_WALK, None, "not permitted", "CAP_PERFMON"),
}
WORKING = (KernelTrial(EXIT_ON_MISSING, Finding(True, "48 annotated -EFAULT exits")),)
REFUSED = (KernelTrial(EXIT_ON_MISSING, Finding(False, "flag 0x8: Invalid argument", "compare the numbers")),)


def test_ept_host_with_annotator_takes_stock_nowait() -> None:
    choice = choose(EPT_HOST)
    assert choice.source is FaultSource.STOCK_NOWAIT
    assert choice.annotator == GPA
    assert choice.kernel_interface is None
    assert choice.verdict_of(FaultSource.BLOCKING).reason == "works; a better one is used"
    assert "kernel-interface" in choice.verdict_of(FaultSource.KERNEL_NOWAIT).remedy


def test_working_kernel_interface_goes_first() -> None:
    choice = choose(replace(EPT_HOST, kernel_trials=REFUSED + WORKING))
    assert choice.source is FaultSource.KERNEL_NOWAIT
    assert choice.kernel_interface == EXIT_ON_MISSING
    assert choice.annotator is None


def test_refused_kernel_interface_is_explained() -> None:
    choice = choose(replace(EPT_HOST, kernel_trials=REFUSED))
    assert choice.source is FaultSource.STOCK_NOWAIT
    assert choice.verdict_of(FaultSource.KERNEL_NOWAIT).reason == "exit-on-missing: flag 0x8: Invalid argument"


@pytest.mark.parametrize("paging", [Paging.SHADOW, Paging.UNKNOWN])
def test_shadow_paging_takes_stock_nowait_only_when_asked(paging: Paging) -> None:
    host = replace(EPT_HOST, paging=paging)
    choice = choose(host)
    assert choice.source is FaultSource.BLOCKING
    stock = choice.verdict_of(FaultSource.STOCK_NOWAIT)
    assert stock.works
    assert "--fault-source stock-nowait" in stock.remedy
    asked = choose(host, "stock-nowait")
    assert (asked.source, asked.annotator) == (FaultSource.STOCK_NOWAIT, GVA)


@pytest.mark.parametrize(
    "lacks",
    [
        {"annotators": NO_PERF},
        {"sigbus": Finding(False, "no SIGBUS", "a newer kernel")},
        {"stock_exit": Finding(False, "47 addresses right", "blocking")},
    ],
)
def test_without_a_part_of_stock_nowait_it_is_blocking(lacks: dict[str, object]) -> None:
    host = replace(EPT_HOST, **lacks)  # type: ignore[arg-type]
    choice = choose(host)
    assert choice.source is FaultSource.BLOCKING
    assert choice.verdict_of(FaultSource.STOCK_NOWAIT).remedy
    with pytest.raises(FaultSourceUnavailableError) as caught:
        choose(host, "stock-nowait")
    assert caught.value.exit_code == 3
    assert caught.value.remedy


def test_no_kvm_is_simulated_for_ourselves_and_blocking_for_a_vmm() -> None:
    assert choose(NO_KVM).source is FaultSource.SIMULATED
    assert choose(NO_KVM, candidates=REAL_SOURCES).source is FaultSource.BLOCKING
    with pytest.raises(FaultSourceUnavailableError, match="not for a real VMM"):
        choose(NO_KVM, "simulated", REAL_SOURCES)


def test_forbidden_kvm_is_not_simulated() -> None:
    forbidden = replace(NO_KVM, kvm=KvmAccess.FORBIDDEN)
    assert choose(forbidden).source is FaultSource.BLOCKING
    with pytest.raises(FaultSourceUnavailableError):
        choose(forbidden, "simulated")


def test_nothing_works_without_userfaultfd() -> None:
    host = replace(EPT_HOST, userfaultfd=Finding(False, "not permitted", "run as root"), kernel_trials=WORKING)
    choice = choose(host)
    assert choice.source is None
    assert all(not verdict.works for verdict in choice.verdicts)
    with pytest.raises(FaultSourceUnavailableError, match="run as root"):
        choose(host, "blocking")


def test_an_explicit_wish_wins_over_a_better_source() -> None:
    choice = choose(EPT_HOST, "blocking")
    assert choice.source is FaultSource.BLOCKING
    assert choice.annotator is None
    assert choice.verdict_of(FaultSource.STOCK_NOWAIT).works
