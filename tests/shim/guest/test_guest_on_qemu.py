"""The firmware on a real QEMU, under KVM and TCG: it starts, works on all its pages, and finds no error."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from farfault_shim.guest import (
    GuestKind,
    GuestParameters,
    Mailbox,
    WorkerState,
    load_image,
    read_histogram,
    read_mailboxes,
    verify_ram,
)
from farfault_shim.guest.addresses import clock_address
from farfault_shim.guest.parameters import GOLDEN
from farfault_shim.guest.program import image_path

QEMU = shutil.which("qemu-system-x86_64")
WAIT_S_MAX = 120.0
ATTEMPTS_MAX = 20
POLL_S = 0.02
MIB = 1 << 20
HOUR_NS = 3600 * 10**9

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed"),
    pytest.mark.skipif(not image_path().exists(), reason="the guest image is not built: make native"),
    pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm for the RAM file"),
]
needs_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm cannot be opened")
accelerators = pytest.mark.parametrize("accelerator", [pytest.param("kvm", marks=needs_kvm), "tcg"])


class Vm:
    """A QEMU that runs the guest; its RAM is a file on tmpfs."""

    def __init__(self, process: subprocess.Popen[bytes], ram: Path, parameters: GuestParameters) -> None:
        self._process = process
        self.ram = ram
        self.parameters = parameters

    def wait_until(self, condition: Callable[[Sequence[Mailbox]], bool]) -> list[Mailbox]:
        """Looks at the mailboxes until the condition holds; fails when QEMU ends or never."""
        deadline = time.monotonic() + WAIT_S_MAX
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "QEMU has ended"
            mailboxes = read_mailboxes(self.ram, self.parameters.vcpus)
            if condition(mailboxes):
                return mailboxes
            time.sleep(POLL_S)
        raise AssertionError(f"not in {WAIT_S_MAX} s: {mailboxes}")

    def freeze(self) -> None:
        """Stops every thread of QEMU, in the middle of whatever the guest does."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Undoes `freeze`."""
        self._process.send_signal(signal.SIGCONT)

    def monitor(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()


@contextmanager
def running_guest(
    parameters: GuestParameters, *, ram_bytes: int, machine: str, accelerator: str, vcpus: int = 0
) -> Iterator[Vm]:
    with TemporaryDirectory(prefix="farfault-guest-", dir="/dev/shm") as directory:
        firmware, ram = Path(directory, "guest.bin"), Path(directory, "vm.ram")
        firmware.write_bytes(parameters.apply(load_image()))
        with ram.open("wb") as file:
            file.truncate(ram_bytes)
        process = subprocess.Popen(
            [
                *(str(QEMU), "-nodefaults", "-no-user-config", "-display", "none", "-monitor", "stdio"),
                *("-machine", f"{machine},memory-backend=mem", "-accel", accelerator),
                *("-object", f"memory-backend-file,id=mem,size={ram_bytes},mem-path={ram},share=on"),
                *("-m", f"{ram_bytes // MIB}M", "-smp", str(vcpus or parameters.vcpus)),
                *("-bios", str(firmware)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with process:
            try:
                yield Vm(process, ram, parameters)
            finally:
                process.kill()


def passes(least: int) -> Callable[[Sequence[Mailbox]], bool]:
    return lambda mailboxes: all(mailbox.passes >= least for mailbox in mailboxes)


@accelerators
@pytest.mark.parametrize(
    ("machine", "ram_mib", "vcpus", "kind"),
    [
        ("pc", 128, 1, GuestKind.SEQUENTIAL),
        ("q35", 128, 4, GuestKind.RANDOM),
        ("pc", 4096, 4, GuestKind.SEQUENTIAL),
        ("q35", 4096, 1, GuestKind.RANDOM),
        ("pc", 128, 2, GuestKind.ZIPF),
        ("q35", 4096, 3, GuestKind.ZIPF),
        ("pc", 128, 2, GuestKind.IDLE),
    ],
)
def test_guest_verifies_its_pages(accelerator: str, machine: str, ram_mib: int, vcpus: int, kind: GuestKind) -> None:
    ram_bytes = ram_mib * MIB
    parameters = GuestParameters.for_ram(ram_bytes, vcpus, machine, pages_max=8000, kind=kind)
    with running_guest(parameters, ram_bytes=ram_bytes, machine=machine, accelerator=accelerator) as vm:
        earlier = vm.wait_until(passes(2))
        # The guest stands still at a moment of its own: some pages are a round ahead of the others.
        vm.wait_until(passes(max(mailbox.passes for mailbox in earlier) + 1))
        vm.freeze()
        mailboxes = read_mailboxes(vm.ram, vcpus)
        with vm.ram.open("rb") as file:
            check = verify_ram(file.fileno(), parameters, mailboxes)
            assert check.ok, check.problems
            assert check.pages == parameters.data_pages == 8000 // vcpus * vcpus
            for vcpu, mailbox in enumerate(mailboxes if not kind.is_skewed else ()):
                _check_order(file.fileno(), parameters, vcpu, mailbox)
        for vcpu, (before, after) in enumerate(zip(earlier, mailboxes, strict=True)):
            assert after.state is WorkerState.VERIFY
            assert (after.errors, after.boots, after.filled) == (0, 1, parameters.pages_per_vcpu)
            assert before.touched < after.touched
            assert after.clock_backwards == 0
            assert (after.clock_reads > 0) == (accelerator == "kvm")
            assert after.clock_last_ns >= before.clock_last_ns
            counted = read_histogram(vm.ram, vcpu).total
            assert counted in (after.touched, after.touched + 1)


def _check_order(fd: int, parameters: GuestParameters, vcpu: int, mailbox: Mailbox) -> None:
    """The pages that are a round ahead are the first of the round's order, as the Python side computes it."""
    ahead = {
        page
        for page in parameters.slice_of(vcpu)
        if int.from_bytes(os.pread(fd, 8, parameters.file_offset_of(page)), "little")
        == ((page + 1) * GOLDEN + mailbox.passes + 1) % (1 << 64)
    }
    assert ahead == set(islice(parameters.round_order(vcpu, mailbox.passes + 1), len(ahead)))


@accelerators
def test_vcpus_that_are_not_wanted_halt(accelerator: str) -> None:
    parameters = GuestParameters.for_ram(64 * MIB, 2, pages_max=1000)
    with running_guest(parameters, ram_bytes=64 * MIB, machine="pc", accelerator=accelerator, vcpus=4) as vm:
        vm.wait_until(passes(2))
        assert [mailbox.boots for mailbox in read_mailboxes(vm.ram, 4)] == [1, 1, 0, 0]


@accelerators
def test_reset_shows_in_the_boot_count(accelerator: str) -> None:
    parameters = GuestParameters.for_ram(64 * MIB, 2, pages_max=1000)
    with running_guest(parameters, ram_bytes=64 * MIB, machine="pc", accelerator=accelerator) as vm:
        vm.wait_until(passes(2))
        vm.monitor("system_reset")
        vm.wait_until(lambda mailboxes: all(mailbox.boots == 2 for mailbox in mailboxes))
        mailboxes = vm.wait_until(passes(2))
        assert [mailbox.errors for mailbox in mailboxes] == [0, 0]


@needs_kvm
def test_guest_finds_a_page_that_somebody_changed() -> None:
    """The detector detects: without this, no number of errors would mean anything."""
    parameters = GuestParameters.for_ram(64 * MIB, 1, pages_max=1000, kvmclock=False)
    with running_guest(parameters, ram_bytes=64 * MIB, machine="pc", accelerator="kvm") as vm:
        vm.wait_until(passes(2))
        place = parameters.file_offset_of(123)
        with vm.ram.open("r+b") as file:
            vm.freeze()
            touched = read_mailboxes(vm.ram, 1)[0].touched
            os.pwrite(file.fileno(), bytes(8), place + 2048)
            vm.resume()
        (mailbox,) = vm.wait_until(lambda mailboxes: mailboxes[0].touched > touched + 2000)
        assert (mailbox.errors, mailbox.error_gpa, mailbox.error_seen) == (1, place + 2048, 0)
        assert mailbox.clock_reads == 0


@needs_kvm
def test_guest_finds_a_clock_that_was_set_back() -> None:
    parameters = GuestParameters.for_ram(64 * MIB, 1, pages_max=1000)
    system_time = clock_address(0) + 16  # of struct pvclock_vcpu_time_info
    with running_guest(parameters, ram_bytes=64 * MIB, machine="pc", accelerator="kvm") as vm:
        (mailbox,) = vm.wait_until(passes(2))
        assert mailbox.clock_backwards == 0
        with vm.ram.open("r+b") as file:
            true_ns = int.from_bytes(os.pread(file.fileno(), 8, system_time), "little")
            for attempt in range(ATTEMPTS_MAX):  # KVM may put the page right before the guest looks
                vm.freeze()
                reads = read_mailboxes(vm.ram, 1)[0].clock_reads
                time_ns = true_ns if attempt % 2 else true_ns + HOUR_NS  # ahead, then back
                os.pwrite(file.fileno(), time_ns.to_bytes(8, "little"), system_time)
                vm.resume()
                (mailbox,) = vm.wait_until(lambda mailboxes, reads=reads: mailboxes[0].clock_reads > reads + 2)
                if mailbox.clock_backwards:
                    break
        assert mailbox.clock_backwards
        assert mailbox.errors == 0
