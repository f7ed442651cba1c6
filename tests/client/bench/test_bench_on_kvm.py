"""Small moves and measurements with real VMs."""

from __future__ import annotations

import os
import shutil

import pytest
from farfault_cli.errors import PreflightError
from farfault_client.bench.compare.run import play
from farfault_client.bench.compare.scenario import Link, Mode, Scenario
from farfault_client.bench.vcpus.measure import FaultSource, Way, measure
from farfault_client.demo.vms import QEMU
from farfault_client.netsim.hosts import check_namespaces
from farfault_shim.guest import GuestKind

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not shutil.which(QEMU), reason=f"no {QEMU}"),
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm"),
]


@pytest.mark.parametrize(
    ("mode", "scenario"),
    [
        (Mode.QEMU, Scenario(ram_bytes=64 << 20)),
        (Mode.QEMU_PREEMPT, Scenario(ram_bytes=64 << 20, rtt_ms=1, vcpus=2)),
        (Mode.NOWAIT, Scenario(ram_bytes=64 << 20, vcpus=2)),
        (Mode.BLOCKING, Scenario(GuestKind.SEQUENTIAL, ram_bytes=64 << 20, rtt_ms=1)),
        (Mode.NOWAIT, Scenario(GuestKind.ZIPF, ram_bytes=64 << 20, vcpus=2)),
    ],
    ids=lambda value: value.value if isinstance(value, Mode) else "",
)
def test_a_move_has_all_figures(mode: Mode, scenario: Scenario) -> None:
    run = play(scenario, mode)
    assert run.verification_errors == 0
    assert run.faults > 0
    assert run.mean_fault_us is not None
    assert run.mean_fault_us > 25
    assert 0 < run.blocked_share <= 1
    assert run.postcopy_s > 0
    assert run.downtime_ms > 0
    assert run.touched_first_second > 0
    assert (run.serve_own_bytes is None) == mode.is_native
    assert {"mode", "guest", "rtt_ms"} <= set(run.to_json())


@pytest.mark.parametrize("mode", [Mode.QEMU_PREEMPT, Mode.NOWAIT], ids=lambda mode: mode.value)
@pytest.mark.parametrize("rtt_ms", [0, 1])
def test_a_move_between_two_network_namespaces(mode: Mode, rtt_ms: float) -> None:
    try:
        check_namespaces()
    except PreflightError as error:
        pytest.skip(error.problem)
    run = play(Scenario(ram_bytes=64 << 20, rtt_ms=rtt_ms, link=Link.NAMESPACES), mode)
    assert run.verification_errors == 0
    assert run.faults > 0
    assert run.to_json()["link"] == "namespaces"


@pytest.mark.parametrize("mode", [Mode.QEMU, Mode.NOWAIT], ids=lambda mode: mode.value)
def test_an_idle_guest_goes_on_whatever_it_missed(mode: Mode) -> None:
    run = play(Scenario(GuestKind.IDLE, ram_bytes=64 << 20, vcpus=2), mode)
    assert run.verification_errors == 0
    assert run.touched_first_second > 0
    assert (run.mean_fault_us is None) == (run.faults == 0)
    assert 0 <= run.blocked_share <= 1


@pytest.mark.parametrize(("source", "way"), [(FaultSource.BLOCKING, Way.LOCAL), (FaultSource.NOWAIT, Way.GRPC)])
def test_missed_pages_are_counted_and_right(source: FaultSource, way: Way) -> None:
    rate = measure(2, source, way)
    assert rate.pages_per_s > 0
    assert rate.errors == 0
