"""KVM's device and module parameters, on made-up trees."""

from __future__ import annotations

from pathlib import Path

import pytest
from farfault_shim.attach.wire import FaultSource
from farfault_shim.sources import KvmAccess, Paging
from farfault_shim.sources.hazards import hazards
from farfault_shim.sources.host import find_kvm, find_paging


@pytest.mark.parametrize(
    ("parameter", "value", "paging"),
    [
        ("kvm_intel/parameters/ept", "Y\n", Paging.TWO_DIMENSIONAL),
        ("kvm_intel/parameters/ept", "N\n", Paging.SHADOW),
        ("kvm_amd/parameters/npt", "1\n", Paging.TWO_DIMENSIONAL),
        ("kvm_amd/parameters/npt", "0\n", Paging.SHADOW),
        ("kvm/parameters/something", "1\n", Paging.UNKNOWN),
    ],
)
def test_paging_from_module_parameters(tmp_path: Path, parameter: str, value: str, paging: Paging) -> None:
    (tmp_path / parameter).parent.mkdir(parents=True)
    (tmp_path / parameter).write_text(value)
    assert find_paging(tmp_path) is paging


def test_missing_device(tmp_path: Path) -> None:
    access, finding = find_kvm(str(tmp_path / "kvm"))
    assert access is KvmAccess.ABSENT
    assert "modprobe" in finding.remedy


def test_a_device_that_is_not_kvm() -> None:
    access, finding = find_kvm("/dev/null")
    assert access is KvmAccess.ABSENT
    assert "is not KVM" in finding.detail


@pytest.mark.parametrize("source", list(FaultSource))
@pytest.mark.parametrize("paging", list(Paging))
def test_only_page_tables_under_stock_nowait_and_shadow_paging_are_open(source: FaultSource, paging: Paging) -> None:
    found = hazards(source, paging)
    assert len(found) == 4
    still_open = [hazard.pages for hazard in found if not hazard.closed]
    exposed = source is FaultSource.STOCK_NOWAIT and paging is not Paging.TWO_DIMENSIONAL
    assert still_open == (["guest page tables"] if exposed else [])
