"""Reference VMs whose memory is far: every KVM, every fault source, and what happens when pages do not come."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest
from farfault_shim.annotate import Annotator
from farfault_shim.attach.wire import AddressSource, FaultSource, ReportKind
from farfault_shim.guest import GuestKind, GuestParameters, Machine, total_touched, verify_ram
from farfault_shim.guest.addresses import MAILBOXES, PARAMETERS, WORKER, histogram_address
from farfault_shim.kvm.fault_profile import PLAIN, ROUGH, FaultProfile
from farfault_shim.kvm.real import RealVm, install_kick_signal
from farfault_shim.kvm.simulated import SimulatedVm
from farfault_shim.kvm.simulated_memory import Backing
from farfault_shim.refvmm.attachment import Attachment
from farfault_shim.refvmm.boot import load_guest
from farfault_shim.refvmm.machine import ReferenceVm, RunState
from farfault_shim.refvmm.memory import GuestMemory
from farfault_shim.sources import FaultSourceUnavailableError, choose
from farfault_shim.sources.host import find_host_facts
from refvmm_rig import MIB, mailboxes, needs_image, needs_kvm, ram_path, wait_for, wait_for_passes
from tiny_receiver import TinyReceiver

RAM_BYTES = 64 * MIB
PAGE_BYTES = 4096
pytestmark = needs_image


@cache
def annotator() -> Annotator | None:
    """Of the tracepoint that names the page of a bare exit on this host."""
    try:
        return choose(find_host_facts(), FaultSource.STOCK_NOWAIT.value, (FaultSource.STOCK_NOWAIT,)).annotator
    except FaultSourceUnavailableError as error:
        pytest.skip(str(error))


class Far:
    """A VM with absent memory, and its receiver."""

    def __init__(self, vm: ReferenceVm, attachment: Attachment, receiver: TinyReceiver) -> None:
        self.vm = vm
        self.attachment = attachment
        self.receiver = receiver


@contextmanager
def far_vm(
    source: FaultSource,
    parameters: GuestParameters,
    *,
    seed: int = 0,
    profile: FaultProfile = PLAIN,
    with_receiver: bool = True,
) -> Iterator[Far]:
    """A VM whose boot memory lies in another file; its own is empty."""
    with ExitStack() as stack:
        boot, path = stack.enter_context(ram_path()), stack.enter_context(ram_path())
        boot_memory = GuestMemory(boot, RAM_BYTES, Machine.PC)
        load_guest(boot_memory, parameters)
        boot_memory.close()
        memory = GuestMemory(path, RAM_BYTES, Machine.PC)
        socket_path = path.with_suffix(".sock")
        receiver = TinyReceiver(socket_path, boot)
        if with_receiver:
            stack.enter_context(receiver)
        release: Callable[[], None] = lambda: None  # noqa: E731
        if source is FaultSource.SIMULATED:
            backing = Backing(memory.base.hva, RAM_BYTES, memory.descriptor)
            kvm = SimulatedVm([backing], seed=seed, profile=profile)
            release = kvm.release
            attachment = Attachment(socket_path, memory, source, on_released=release)
        else:
            install_kick_signal()
            kvm = RealVm()  # type: ignore[assignment]
            sampled = annotator() if source is FaultSource.STOCK_NOWAIT else None
            attachment = Attachment(socket_path, memory, source, sampled)
        stack.callback(attachment.client.close)
        if with_receiver:
            attachment.client.wait_ready(10)
        vm = ReferenceVm(
            kvm,
            memory,
            parameters.vcpus,
            kvmclock=parameters.kvmclock,
            make_far_faults=attachment.watch,
            wake=attachment.client.wake,
        )
        stack.callback(vm.close)
        yield Far(vm, attachment, receiver)


sources = pytest.mark.parametrize(
    "source",
    [
        pytest.param(FaultSource.STOCK_NOWAIT, marks=needs_kvm),
        pytest.param(FaultSource.BLOCKING, marks=needs_kvm),
        FaultSource.SIMULATED,
    ],
    ids=lambda source: source.value,
)
exits = pytest.mark.parametrize(
    "source",
    [pytest.param(FaultSource.STOCK_NOWAIT, marks=needs_kvm), FaultSource.SIMULATED],
    ids=lambda source: source.value,
)


@sources
@pytest.mark.parametrize("vcpus", [1, 4])
def test_guest_runs_on_memory_that_comes_page_by_page(source: FaultSource, vcpus: int) -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, vcpus, pages_max=1000, kind=GuestKind.RANDOM)
    with far_vm(source, parameters) as far:
        far.vm.resume()
        wait_for_passes(far.vm, 2)
        far.vm.pause()
        check = verify_ram(far.vm.memory.descriptor, parameters, mailboxes(far.vm))
        assert check.ok, check.problems
        if source is FaultSource.BLOCKING:
            assert far.receiver.sleepers >= 1000
        else:
            assert len(far.receiver.gpas) >= 1000
            starts = [report for report in far.receiver.reports if report.kind is ReportKind.START]
            assert sorted(report.vcpu for report in starts) == list(range(vcpus))
        counters = far.attachment.client.state.vcpus()
        assert sorted(counters) == list(range(vcpus))
        assert far.attachment.may_save()

        touched = total_touched(mailboxes(far.vm))
        far.receiver.release()
        assert far.attachment.client.released.wait(10)
        assert not far.attachment.may_save()
        far.vm.resume()
        wait_for(lambda: total_touched(mailboxes(far.vm)) > touched, "more pages")
        assert not any(mailbox.errors for mailbox in mailboxes(far.vm))


@sources
def test_kvmclock_is_updated_where_its_page_was_absent(source: FaultSource) -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, pages_max=500, clock_interval_pages=8)
    with far_vm(source, parameters) as far:
        far.vm.resume()
        wait_for_passes(far.vm, 1)
        (mailbox,) = mailboxes(far.vm)
        assert mailbox.clock_reads > 0
        assert mailbox.clock_version > 0
        assert mailbox.clock_backwards == 0


@exits
def test_a_vcpu_that_waits_for_a_page_stops_and_goes_on(source: FaultSource) -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, 2, pages_max=1000)
    with far_vm(source, parameters) as far:
        far.receiver.holding.set()
        far.vm.resume()
        counters = far.attachment.client.state.vcpus
        for _ in range(10):
            wait_for(lambda: sum(counter.waiting for counter in counters().values()) == 2, "both vCPUs to wait")
            far.vm.pause()
            assert far.vm.run_state is RunState.PAUSED
            far.vm.resume()
        far.receiver.let_go()
        wait_for_passes(far.vm, 1)
        far.vm.pause()
        assert verify_ram(far.vm.memory.descriptor, parameters, mailboxes(far.vm)).ok
        assert all(counter.kicks >= 10 and not counter.waiting for counter in counters().values())


@needs_kvm
def test_a_vcpu_that_sleeps_in_the_kernel_stops() -> None:
    """On a data page: a shadow-paging KVM that reads a page table itself sleeps where no signal reaches it."""
    parameters = GuestParameters.for_ram(RAM_BYTES, pages_max=1000)
    with far_vm(FaultSource.BLOCKING, parameters) as far:
        far.vm.resume()
        wait_for(lambda: far.receiver.sleepers >= 100, "the guest to be at its data pages")
        far.receiver.holding.set()
        wait_for(lambda: far.receiver.is_holding, "the vCPU to sleep")
        far.vm.pause()
        assert far.vm.run_state is RunState.PAUSED
        far.receiver.let_go()
        far.vm.resume()
        wait_for_passes(far.vm, 1)


@exits
def test_the_guest_waits_for_a_receiver_that_comes_late_and_over_its_restart(source: FaultSource) -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, 2, pages_max=4000, kind=GuestKind.RANDOM)
    with far_vm(source, parameters, with_receiver=False) as far:
        far.vm.resume()
        counters = far.attachment.client.state.vcpus
        wait_for(lambda: sum(counter.waiting for counter in counters().values()) == 2, "both vCPUs to wait")
        boot = far.receiver
        with TinyReceiver(boot.path, Path(f"/proc/self/fd/{boot._source}")) as first:
            wait_for(lambda: len(first.gpas) > 200, "some pages")
            first.holding.set()
            wait_for(lambda: sum(counter.waiting for counter in counters().values()) == 2, "both vCPUs to wait")
        with TinyReceiver(boot.path, Path(f"/proc/self/fd/{boot._source}")) as second:
            wait_for_passes(far.vm, 1)
            assert second.gpas
        far.vm.pause()
        assert verify_ram(far.vm.memory.descriptor, parameters, mailboxes(far.vm)).ok


@needs_kvm
@pytest.mark.parametrize("kind", [GuestKind.SEQUENTIAL, GuestKind.RANDOM])
def test_real_and_simulated_kvm_miss_the_same_pages_in_the_same_order(kind: GuestKind) -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, pages_max=600, kind=kind, clock_interval_pages=16)
    orders = []
    for source in (FaultSource.STOCK_NOWAIT, FaultSource.SIMULATED):
        with far_vm(source, parameters) as far:
            far.vm.resume()
            wait_for_passes(far.vm, 1)
            far.vm.pause()
            orders.append([gpa for gpa, _ in itertools.groupby(far.receiver.gpas)])
            assert not far.receiver.passed
            assert not far.receiver.escalated
    data = [parameters.address_of(page) for page in parameters.round_order(0, 0)]
    assert orders[0] == [WORKER, MAILBOXES, histogram_address(0), PARAMETERS, *data]
    assert orders[1] == orders[0]


def test_same_seed_same_exits() -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, pages_max=300, kind=GuestKind.RANDOM)

    def run(seed: int) -> list[tuple[int, ...]]:
        profile = FaultProfile(emulated=0.2, bare=0.5, stale=0.1, lost_sample=0.1)
        with far_vm(FaultSource.SIMULATED, parameters, seed=seed, profile=profile) as far:
            far.vm.resume()
            wait_for_passes(far.vm, 1)
            far.vm.pause()
            return [
                (report.ret, report.err, report.exit_reason, report.address_source, report.gpa)
                for report in far.receiver.reports[:400]
            ]

    first = run(1)
    assert first == run(1)
    assert first != run(2)


def test_a_rough_kvm_loses_nothing() -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, 3, pages_max=1500, kind=GuestKind.RANDOM, clock_interval_pages=8)
    with far_vm(FaultSource.SIMULATED, parameters, seed=7, profile=ROUGH) as far:
        far.vm.resume()
        wait_for_passes(far.vm, 1)
        far.vm.pause()
        check = verify_ram(far.vm.memory.descriptor, parameters, mailboxes(far.vm))
        assert check.ok, check.problems
        assert not far.receiver.escalated
        seen = {(report.ret, report.err, report.exit_reason, report.address_source) for report in far.receiver.reports}
        assert (-1, errno.EFAULT, 39, AddressSource.KVM_RUN) in seen
        assert (-1, errno.EFAULT, 0, AddressSource.TRACEPOINT_GVA) in seen
        assert (-1, errno.EFAULT, 0, AddressSource.NONE) in seen
        assert (0, 0, 6, AddressSource.MMIO) in seen


def test_what_is_none_of_ours_goes_to_the_vmm() -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, pages_max=300)
    with far_vm(FaultSource.SIMULATED, parameters, profile=FaultProfile(foreign=0.01)) as far:
        far.vm.resume()
        wait_for(lambda: bool(far.vm.failure), "the VMM to see the exit")
        assert len(far.receiver.passed) == 1
        assert "errno EFAULT, exit_reason 39" in far.vm.failure


def test_poison_goes_to_the_vmm_without_asking() -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, pages_max=300)
    with far_vm(FaultSource.SIMULATED, parameters, profile=FaultProfile(poisoned=0.01)) as far:
        far.vm.resume()
        wait_for(lambda: bool(far.vm.failure), "the VMM to see the exit")
        assert not far.receiver.passed
        assert "errno 133" in far.vm.failure or "EHWPOISON" in far.vm.failure


def test_an_exit_that_makes_no_progress_is_escalated() -> None:
    parameters = GuestParameters.for_ram(RAM_BYTES, pages_max=300)
    with far_vm(FaultSource.SIMULATED, parameters, profile=FaultProfile(bare=1.0, lost_sample=1.0)) as far:
        far.vm.resume()
        wait_for(lambda: bool(far.vm.failure), "the VMM to see the exit")
        assert len(far.receiver.escalated) == 1
        assert f"rip {WORKER:#x}" in far.receiver.escalated[0].log_line
