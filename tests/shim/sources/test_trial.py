"""What reports of scratch VMs mean, and the real trials on this machine."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from farfault_shim.annotate import AddressKind, Annotator, Discovery, discover
from farfault_shim.annotate.annotator import PAGE_FAULT, PAGETABLE_WALK
from farfault_shim.kvm.nowait import EXIT_ON_MISSING, NowaitInterface, NowaitSeries
from farfault_shim.sources import Paging
from farfault_shim.sources.host import find_host_facts
from farfault_shim.sources.trial import Report, Trials, run_in_child, run_trials

GOOD = {"bare": 48, "annotated": 0, "finished": True, "right": {"gpa": 0, "gva": 48}}
needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened")


@pytest.mark.parametrize(
    ("right", "paging"),
    [
        ({"gpa": 48, "gva": 0}, Paging.TWO_DIMENSIONAL),
        ({"gpa": 0, "gva": 48}, Paging.SHADOW),
        ({"gpa": 47, "gva": 47}, Paging.UNKNOWN),
        ({}, Paging.UNKNOWN),
    ],
)
def test_paging_is_what_the_right_tracepoint_says(right: dict[str, int], paging: Paging) -> None:
    assert Trials(GOOD | {"right": right}, ()).paging is paging


def test_paging_is_unknown_without_faults() -> None:
    assert Trials({"problem": "no userfaultfd"}, ()).paging is Paging.UNKNOWN


@pytest.mark.parametrize(
    ("report", "ok", "detail"),
    [
        (GOOD, True, "48 bare -EFAULT exits, 48 addresses right"),
        (GOOD | {"right": {"gva": 47}}, False, "48 bare -EFAULT exits, 47 addresses right"),
        (GOOD | {"right": {}}, True, "48 bare -EFAULT exits, addresses not checked"),
        (GOOD | {"bare": 0, "annotated": 48}, True, "48 annotated -EFAULT exits, 48 addresses right"),
        (GOOD | {"bare": 40, "annotated": 8}, True, "48 mixed -EFAULT exits, 48 addresses right"),
        (GOOD | {"finished": False}, False, "scratch VM: the guest read wrong data"),
        (GOOD | {"bare": 0}, False, "scratch VM: an absent page did not end KVM_RUN"),
        (GOOD | {"problem": "KVM_RUN: Bad address"}, False, "scratch VM: KVM_RUN: Bad address"),
    ],
)
def test_stock_exit(report: dict[str, Any], ok: bool, detail: str) -> None:
    finding = Trials(report, ()).stock_exit(Paging.SHADOW)
    assert (finding.ok, finding.detail) == (ok, detail)
    assert bool(finding.remedy) != ok


KERNEL_GOOD = {"bare": 0, "annotated": 48, "finished": True, "right": {"kvm_run": 48}, "has_capability": True}


@pytest.mark.parametrize(
    ("report", "ok", "words"),
    [
        (KERNEL_GOOD | {"notes": ["direct KVM_ENABLE_CAP(236): EINVAL"]}, True, "48 annotated .* EINVAL"),
        (KERNEL_GOOD | {"bare": 1}, False, "1 exits were not annotated"),
        (KERNEL_GOOD | {"right": {"kvm_run": 47}}, False, "wrong addresses"),
        ({"problem": "flag 0x8: Invalid argument", "has_capability": False}, False, "236 is not reported"),
    ],
)
def test_kernel_trial(report: Report, ok: bool, words: str) -> None:
    requests: list[dict[str, Any]] = []

    def run(request: dict[str, Any]) -> Report:
        requests.append(request)
        return report if "interface" in request else GOOD

    annotators = {
        AddressKind.GPA: Discovery(PAGE_FAULT, Annotator(AddressKind.GPA, 100, 24, 8)),
        AddressKind.GVA: Discovery(PAGETABLE_WALK, None, "not permitted"),
    }
    trials = run_trials([EXIT_ON_MISSING], annotators, run=run)
    (kernel,) = trials.kernel
    assert kernel.result.ok == ok
    assert re.search(words, kernel.result.detail)
    assert requests[0]["interface"] == ["exit-on-missing", 236, 8]
    assert requests[1]["annotators"] == {"gpa": (100, 24, 8)}


@needs_kvm
def test_this_kernel_ends_kvm_run_for_an_absent_page() -> None:
    facts = find_host_facts()
    assert facts.stock_exit is not None
    assert facts.stock_exit.ok, facts.stock_exit
    assert facts.paging is not Paging.UNKNOWN
    assert facts.annotator.annotator is not None


@needs_kvm
def test_this_kernel_refuses_unallocated_flags_and_the_direct_enable() -> None:
    """No released kernel has the interface: the flag is refused, and so is enabling the capability directly."""
    for series in NowaitSeries:
        interface = NowaitInterface(series, 236, 1 << 31)
        (trial,) = run_trials([interface], {}).kernel
        assert not trial.result.ok
        assert "KVM_SET_USER_MEMORY_REGION with flag 0x80000000: Invalid argument" in trial.result.detail
        assert "direct KVM_ENABLE_CAP(236): EINVAL" in trial.result.detail


def test_a_trial_that_breaks_or_never_ends_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the trial broke: " in run_in_child({"annotators": {"no such kind": [1, 2, 3]}})["problem"]
    monkeypatch.setattr("sys.executable", "/nonexistent/python")
    assert "cannot be started" in run_in_child({})["problem"]


@needs_kvm
def test_a_flag_that_does_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM_MEM_LOG_DIRTY_PAGES is accepted, and the vCPU then sleeps on its first absent page."""
    monkeypatch.setattr("farfault_shim.sources.trial.TRIAL_TIMEOUT_S", 1.0)
    (trial,) = run_trials([NowaitInterface(NowaitSeries.EXIT_ON_MISSING, 236, 1)], {}).kernel
    assert "waited in KVM_RUN" in trial.result.detail


@needs_kvm
def test_annotators_agree_with_the_guests_registers() -> None:
    report = run_in_child({"annotators": {k.value: f.annotator[1:] for k, f in discover().items() if f.annotator}})
    assert report["finished"]
    assert max(report["right"].values()) == report["bare"] + report["annotated"]
