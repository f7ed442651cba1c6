"""Discovery of annotators: on made-up trees, and on this machine's tracefs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from farfault_shim.annotate import AddressKind, SamplerUnavailableError, TracepointSampler, discover
from farfault_shim.annotate.annotator import Annotator
from farfault_shim.annotate.discover import MOUNT_REMEDY, TRACEFS_PATHS

TRACEFS = next((path for path in TRACEFS_PATHS if (path / "events" / "kvm").is_dir()), None)
needs_tracefs = pytest.mark.skipif(TRACEFS is None, reason="tracefs with KVM's events is not mounted or not readable")
UNKNOWN_EVENT_ID = 1 << 30


def test_no_tracefs(tmp_path: Path) -> None:
    for found in discover([tmp_path]).values():
        assert (found.annotator, found.problem, found.remedy) == (None, "tracefs is not mounted", MOUNT_REMEDY)


def test_kvm_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "events" / "sched").mkdir(parents=True)
    assert "KVM is not loaded" in discover([tmp_path])[AddressKind.GPA].problem


def test_tracepoint_missing_from_this_kernel(tmp_path: Path) -> None:
    (tmp_path / "events" / "kvm").mkdir(parents=True)
    found = discover([tmp_path])[AddressKind.GVA]
    assert found.problem == "this kernel has no tracepoint kvmmmu:kvm_mmu_pagetable_walk"


def test_second_mount_point_and_strange_format(tmp_path: Path) -> None:
    event = tmp_path / "second" / "events" / "kvm" / "kvm_page_fault"
    event.mkdir(parents=True)
    (event / "format").write_text("name: kvm_page_fault\nID: 1\n\tfield:u64 other;\toffset:8;\tsize:8;\tsigned:0;\n")
    found = discover([tmp_path / "first", tmp_path / "second"])[AddressKind.GPA]
    assert found.annotator is None
    assert found.problem == "event kvm_page_fault has no field fault_address; it has other"


def test_unreadable_tracefs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    found = discover([Path("/somewhere")])[AddressKind.GPA]
    assert found.problem == "/somewhere may not be read by this user"
    assert "gid=GROUP" in found.remedy


@needs_tracefs
def test_this_machine() -> None:
    found = discover()
    assert {kind for kind, one in found.items() if one.annotator} == {AddressKind.GPA, AddressKind.GVA}
    annotator = found[AddressKind.GPA].annotator
    assert annotator is not None
    assert annotator.event_id > 0
    assert annotator.size == 8


@needs_tracefs
def test_sampler_reads_the_newest_sample() -> None:
    """On a tracepoint that any thread can fire: entering getpgid, whose argument is the address."""
    assert TRACEFS is not None
    event = TRACEFS / "events" / "syscalls" / "sys_enter_getpgid"
    if not event.is_dir():
        pytest.skip("the kernel has no system call tracepoints")
    event_id = int((event / "id").read_text())
    sampler = TracepointSampler(Annotator(AddressKind.GVA, event_id, 16, 8))
    try:
        assert sampler.newest() is None
        for _ in range(5000):  # the ring wraps several times
            os.getpgid(0)
        own = os.getpid()
        os.getpgid(own)
        assert sampler.newest() == own
        assert sampler.newest() is None
    finally:
        sampler.close()


@needs_tracefs
def test_unknown_event_says_why_and_what_to_do() -> None:
    with pytest.raises(SamplerUnavailableError) as caught:
        TracepointSampler(Annotator(AddressKind.GPA, UNKNOWN_EVENT_ID, 8, 8))
    assert "perf_event_paranoid" in caught.value.problem
    assert "CAP_PERFMON" in caught.value.remedy
