"""Figures of a fleet, when pages came, what is reported, and a small fleet that moves."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from farfault_cli.errors import PreflightError, UsageError
from farfault_client.bench.command import bench
from farfault_client.bench.fleet import command
from farfault_client.bench.fleet.arrivals import Arrivals
from farfault_client.bench.fleet.command import markdown_report
from farfault_client.bench.fleet.figures import (
    FLEET_HEADINGS,
    METRICS,
    FleetFigures,
    VmFigures,
    fleet_rows,
    jain_index,
    longest_pause_s,
    vm_rows,
)
from farfault_client.bench.fleet.run import play
from farfault_client.demo.fault_source import choose_fault_source
from farfault_client.demo.scene import SceneConfig
from farfault_client.demo.vms import VmmKind

VM = VmFigures(
    0,
    pages=8000,
    switchover_s=0.5,
    downtime_ms=20.0,
    postcopy_s=2.0,
    demand_faults=10,
    mean_fault_us=1500.0,
    p99_fault_us=9000.0,
    longest_pause_s=0.25,
    verification_errors=0,
)


@pytest.fixture
def fleet() -> FleetFigures:
    slow = replace(VM, vm=2, postcopy_s=8.0, demand_faults=0, mean_fault_us=None, p99_fault_us=None)
    return FleetFigures([VM, replace(VM, vm=1, switchover_s=1.5), slow], looked_every_s=0.03)


@pytest.mark.parametrize(
    ("rates", "index"),
    [([5.0, 5.0, 5.0], 1.0), ([7.0, 0.0, 0.0, 0.0], 0.25), ([1.0, 2.0, 3.0], 36 / 42), ([3.0], 1.0)],
)
def test_fairness(rates: list[float], index: float) -> None:
    assert jain_index(rates) == pytest.approx(index)


@pytest.mark.parametrize("rates", [[], [0.0, 0.0]])
def test_fairness_of_nothing_is_an_error(rates: list[float]) -> None:
    with pytest.raises(ValueError, match="no rate"):
        jain_index(rates)


@pytest.mark.parametrize(
    ("arrivals", "pause_s"),
    [
        ([], 10.0),
        ([11.0, 12.0, 13.0, 19.0], 6.0),
        ([15.0, 14.0], 5.0),  # until the last page
        ([16.0, 17.0], 6.0),  # from the switchover
        ([1.0, 10.0, 15.0, 20.0, 99.0], 5.0),  # what is outside counts nothing
    ],
)
def test_longest_pause(arrivals: list[float], pause_s: float) -> None:
    assert longest_pause_s(arrivals, 10.0, 20.0) == pause_s


def test_figures_of_the_fleet(fleet: FleetFigures) -> None:
    assert fleet.slowest.vm == 2
    assert fleet.slowest_over_median == 4.0
    assert fleet.total_s == 8.5
    assert fleet.fairness == pytest.approx(jain_index([4000, 4000, 1000]))


def test_rows_fit_their_headings(fleet: FleetFigures) -> None:
    assert {len(row) for row in fleet_rows(fleet)} == {len(FLEET_HEADINGS)}
    assert {len(row) for row in vm_rows(fleet)} == {1 + len(METRICS)}
    rows = {row[0]: row[1:] for row in fleet_rows(fleet)}
    assert rows["post-copy (s)"] == ["2.00", "2.00", "8.00", "8.00"]
    assert rows["demand fault, mean (ms)"] == ["1.5", "1.5", "1.5", "-"]


def test_without_any_fault_there_is_no_latency() -> None:
    quiet = FleetFigures([replace(VM, mean_fault_us=None, p99_fault_us=None)], 0.01)
    rows = {row[0]: row[1:] for row in fleet_rows(quiet)}
    assert rows["demand fault, p99 (ms)"] == ["-"] * 4
    assert quiet.to_json()["spreads"]["p99_fault_us"] is None


def test_json_object(fleet: FleetFigures) -> None:
    shown = json.loads(json.dumps(fleet.to_json()))
    assert [vm["vm"] for vm in shown["vms"]] == [0, 1, 2]
    assert shown["vms"][2]["pages_per_s"] == 1000
    assert set(shown["spreads"]) == {metric.name for metric in METRICS} <= set(shown["vms"][0])


def test_markdown_names_machine_command_and_fleet(fleet: FleetFigures) -> None:
    text = markdown_report(fleet, "3 VMs", {"kernel": "Linux 7"}, "farfault bench fleet --vms 3")
    for part in (
        "## Many VMs",
        "Linux 7",
        "farfault bench fleet --vms 3",
        "3 VMs.",
        "| post-copy (s) | 2.00 |",
        "4.00",
    ):
        assert part in text


def test_pages_are_seen_to_come(tmp_path: Path) -> None:
    rams = [tmp_path / name for name in ("first", "second")]
    for ram in rams:
        ram.touch()
    with Arrivals(rams) as arrivals:
        arrivals.look()
        with rams[1].open("r+b") as file:
            file.write(os.urandom(1 << 16))
            file.flush()
            os.fsync(file.fileno())
        arrivals.look()
    assert arrivals.moments[0] == []
    assert arrivals.moments[1]
    assert arrivals.looked_every_s > 0


@pytest.mark.parametrize("size", ["16MiB", "33MiB"])
def test_guests_need_some_memory(size: str) -> None:
    assert isinstance(CliRunner().invoke(bench, ["fleet", "--ram", size]).exception, UsageError)


def test_a_fleet_that_does_not_fit_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_available_bytes", lambda: 5 * (command.HELPERS_BYTES + (64 << 20)))
    error = CliRunner().invoke(bench, ["fleet", "--vmm", "simulated", "--vms", "9"]).exception
    assert isinstance(error, PreflightError)
    assert "--vms 5" in error.remedy


def test_without_kvm_a_real_vmm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_has_kvm", lambda: False)
    assert isinstance(CliRunner().invoke(bench, ["fleet", "--vmm", "reference"]).exception, PreflightError)


@pytest.mark.e2e
def test_a_small_fleet_moves_and_is_right() -> None:
    kind = VmmKind.REFERENCE if VmmKind.best() is not VmmKind.SIMULATED else VmmKind.SIMULATED
    source = choose_fault_source(kind, "auto")
    told: list[str] = []
    fleet = play(SceneConfig(kind, ram_bytes=24 << 20, vcpus=1, fault_source=source), 3, told.append)
    assert [vm.vm for vm in fleet.vms] == [0, 1, 2]
    assert fleet.verification_errors == 0
    assert {vm.pages for vm in fleet.vms} == {(24 << 20) // 4096}
    for vm in fleet.vms:
        assert vm.postcopy_s > 0
        assert 0 < vm.longest_pause_s <= vm.postcopy_s
    assert 1 / 3 <= fleet.fairness <= 1 + 1e-9
    assert "ended 3/3" in told
