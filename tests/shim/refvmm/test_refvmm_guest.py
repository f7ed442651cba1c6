"""The self-verifying guest in the reference VMM."""

from __future__ import annotations

import pytest
from farfault_shim.guest import GuestKind, GuestParameters, Machine, total_touched, verify_ram
from farfault_shim.refvmm.machine import RunState, WrongStateError
from refvmm_rig import (
    MIB,
    booted,
    mailboxes,
    needs_image,
    needs_kvm,
    ram_path,
    real_kvm,
    wait_for,
    wait_for_passes,
)

pytestmark = [needs_image, needs_kvm]


@pytest.mark.parametrize(
    ("machine", "ram_mib", "vcpus"),
    [(Machine.PC, 128, 1), (Machine.FLAT, 128, 4), (Machine.PC, 4096, 4), (Machine.Q35, 3072, 1)],
)
def test_guest_verifies_its_pages(machine: Machine, ram_mib: int, vcpus: int) -> None:
    parameters = GuestParameters.for_ram(ram_mib * MIB, vcpus, machine, pages_max=4000, kind=GuestKind.RANDOM)
    with ram_path() as path, booted(real_kvm, path, parameters, ram_mib * MIB, machine) as vm:
        assert vm.run_state is RunState.PRELAUNCH
        vm.resume()
        wait_for_passes(vm, 2)
        vm.pause()
        assert vm.run_state is RunState.PAUSED
        stopped = mailboxes(vm)
        check = verify_ram(vm.memory.descriptor, parameters, stopped)
        assert check.ok, check.problems
        assert check.pages == 4000
        assert all(mailbox.errors == 0 and mailbox.boots == 1 for mailbox in stopped)
        assert all(mailbox.clock_reads and not mailbox.clock_backwards for mailbox in stopped)
        assert mailboxes(vm) == stopped
        vm.resume()
        wait_for_passes(vm, max(mailbox.passes for mailbox in stopped) + 1)
        assert total_touched(mailboxes(vm)) > total_touched(stopped)


def test_stop_and_go_a_hundred_times() -> None:
    parameters = GuestParameters.for_ram(64 * MIB, 4, pages_max=400)
    with ram_path() as path, booted(real_kvm, path, parameters, 64 * MIB, Machine.PC) as vm:
        for _ in range(100):
            vm.resume()
            vm.pause()
        vm.resume()
        wait_for_passes(vm, 2)
        assert not any(mailbox.errors for mailbox in mailboxes(vm))


def test_an_impossible_instruction_stops_the_vm_with_a_reason() -> None:
    parameters = GuestParameters.for_ram(64 * MIB, pages_max=400)
    with ram_path() as path, booted(real_kvm, path, parameters, 64 * MIB, Machine.PC) as vm:
        vm.memory.write(0x8000, b"\x0f\x0b" * 8)  # ud2, and no handler: a triple fault
        vm.resume()
        wait_for(lambda: bool(vm.failure), "the failure")
        assert vm.run_state is RunState.INTERNAL_ERROR
        assert "exit_reason 8, rip 0x8000" in vm.failure
        with pytest.raises(WrongStateError, match="internal-error"):
            vm.resume()
