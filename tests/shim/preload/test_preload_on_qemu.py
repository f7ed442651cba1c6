"""The preload library in unmodified QEMUs: a guest that moved finds no error, stays stoppable, and waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from farfault_shim.attach.wire import AddressSource, ReportKind
from farfault_shim.guest import GuestKind, GuestParameters, total_touched, verify_ram
from farfault_shim.guest.program import image_path
from farfault_shim.sources.userfault import find_userfaultfd
from preload_vms import FARFAULT, QEMU, RAM_BYTES, Qmp, Vm, load_state, save_source, under_farfault, wait_for
from tiny_receiver import TinyReceiver

FAULTS_BEFORE_HOLD = 300
PARAMETERS = GuestParameters.for_ram(RAM_BYTES, 2, kind=GuestKind.RANDOM, pages_max=3000)

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(not image_path().exists(), reason="the guest image is not built: make native"),
    pytest.mark.skipif(not FARFAULT.exists(), reason="farfault is not installed beside python"),
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened"),
    pytest.mark.skipif(not find_userfaultfd().permitted, reason="userfaultfd is not permitted"),
]
fault_sources = pytest.mark.parametrize("fault_source", ["stock-nowait", "blocking"])


class Moved(NamedTuple):
    """A guest that goes on at the destination; closing `receiver_life` ends its receiver."""

    vm: Vm
    qmp: Qmp
    receiver: TinyReceiver
    receiver_life: ExitStack
    source_passes: int


@contextmanager
def moved_vm(place: Path, fault_source: str) -> Iterator[Moved]:
    """None of its pages are there when it goes on; the receiver serves them."""
    source, state = save_source(place, PARAMETERS)
    vm = Vm(place, "destination", PARAMETERS)
    attach = place / "attach.sock"
    with ExitStack() as receiver_life:
        receiver = receiver_life.enter_context(TinyReceiver(attach, source.ram))
        with vm.running(under_farfault(attach, vm, fault_source), ["-incoming", "defer", "-S"]) as qmp:
            assert receiver.attached.wait(30)
            load_state(qmp, state)
            qmp("cont")
            yield Moved(vm, qmp, receiver, receiver_life, source.passes())


def check_whole_ram(vm: Vm, qmp: Qmp, receiver: TinyReceiver) -> None:
    """Installs the rest, stops the guest and compares all of its RAM with what it must hold."""
    receiver.release()
    qmp("stop")
    descriptor = os.open(vm.ram, os.O_RDONLY)
    try:
        check = verify_ram(descriptor, PARAMETERS, vm.mailboxes())
    finally:
        os.close(descriptor)
    assert check.ok, check.problems
    assert check.pages == PARAMETERS.data_pages


@fault_sources
def test_a_moved_guest_finds_no_error(place: Path, fault_source: str) -> None:
    with moved_vm(place, fault_source) as (vm, qmp, receiver, _, before):
        wait_for(lambda: vm.passes() >= before + 2, "two passes at the destination")
        assert receiver.escalated == receiver.passed == []
        if fault_source == "blocking":
            assert receiver.sleepers > 0
            assert receiver.gpas == []
        else:
            exits = [report for report in receiver.reports if report.kind is ReportKind.EXIT]
            assert len(receiver.gpas) > FAULTS_BEFORE_HOLD
            assert {report.address_source for report in exits} <= {
                AddressSource.TRACEPOINT_GVA,
                AddressSource.TRACEPOINT_GPA,
                AddressSource.MMIO,
            }
        check_whole_ram(vm, qmp, receiver)
        touched = total_touched(vm.mailboxes())
        qmp("cont")
        wait_for(lambda: total_touched(vm.mailboxes()) > touched, "progress after the release")


def test_a_vcpu_that_waits_for_a_page_can_be_stopped(place: Path) -> None:
    with moved_vm(place, "stock-nowait") as (vm, qmp, receiver, _, before):
        wait_for(lambda: len(receiver.gpas) > FAULTS_BEFORE_HOLD, "faults")
        receiver.holding.set()
        wait_for(lambda: _held_exits(receiver) > 0, "a vCPU that waits")
        qmp("stop")  # returns while the page is withheld
        assert receiver.holding.is_set()
        assert qmp("query-status")["status"] == "paused"
        receiver.let_go()
        qmp("cont")
        wait_for(lambda: vm.passes() > before + 1, "passes after cont")
        check_whole_ram(vm, qmp, receiver)


@fault_sources
def test_the_guest_waits_for_another_receiver(place: Path, fault_source: str) -> None:
    """A receiver that dies closes its userfaultfd; the VMM's own keeps missing pages missing."""
    with moved_vm(place, fault_source) as (vm, qmp, receiver, life, before):
        wait_for(lambda: receiver.sleepers + len(receiver.gpas) > FAULTS_BEFORE_HOLD, "faults")
        receiver.holding.set()
        wait_for(lambda: _held_exits(receiver) > 0, "vCPUs that wait")
        life.close()
        resident = vm.ram.stat().st_blocks
        assert resident * 512 < RAM_BYTES
        with TinyReceiver(place / "attach.sock", place / "source.ram") as second:
            assert second.attached.wait(30)
            wait_for(lambda: vm.passes() > before + 1, "passes with the second receiver")
            check_whole_ram(vm, qmp, second)
        assert "the receiver is gone; the guest waits for missing pages" in vm.log()


def _held_exits(receiver: TinyReceiver) -> int:
    return len(receiver._held)
