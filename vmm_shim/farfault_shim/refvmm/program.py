"""The reference VMM as a process: puts the parts together and waits for its end."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from farfault_cli.errors import FarfaultError, UsageError, VerificationError

from farfault_shim.attach.wire import FaultSource
from farfault_shim.guest import GuestKind, GuestParameters, Machine, read_mailboxes, total_touched, verify_ram
from farfault_shim.kvm.fault_profile import PROFILES
from farfault_shim.kvm.interface import Vm
from farfault_shim.kvm.real import RealVm, install_kick_signal
from farfault_shim.kvm.simulated import SimulatedVm
from farfault_shim.kvm.simulated_memory import Backing
from farfault_shim.refvmm.attachment import Attachment
from farfault_shim.refvmm.boot import load_guest
from farfault_shim.refvmm.machine import ReferenceVm
from farfault_shim.refvmm.memory import GuestMemory
from farfault_shim.refvmm.qmp_commands import QmpCommands
from farfault_shim.refvmm.qmp_server import QmpServer

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S: Final = 0.05
"""Between two looks at the VM: has it failed, has it done its passes?"""
WAKES_MAX: Final = 4096
"""Bytes taken off the wake pipe at a time: one a signal, and each kick of a vCPU is one."""
SWITCH_INTERVAL_S: Final = 0.0005
"""Python threads take turns this often while the guest itself is Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of the command, under the same names."""

    ram: Path
    size_bytes: int
    vcpus: int
    machine: str
    qmp: Path | None = None
    incoming: bool = False
    paused: bool = False
    attach: Path | None = None
    fault_source: str = "auto"
    simulated: bool = False
    seed: int = 0
    profile: str = "plain"
    random_order: bool = False
    pages: int | None = None
    kvmclock: bool = True
    passes: int | None = None

    def guest_parameters(self) -> GuestParameters:
        """Raises UsageError where RAM is too small for so many vCPUs or pages."""
        try:
            return GuestParameters.for_ram(
                self.size_bytes,
                self.vcpus,
                Machine(self.machine),
                pages_max=self.pages,
                kind=GuestKind.RANDOM if self.random_order else GuestKind.SEQUENTIAL,
                kvmclock=self.kvmclock,
            )
        except ValueError as error:
            raise UsageError(f"the guest does not fit: {error}", "give more --size, or fewer --vcpus") from error


@dataclass(frozen=True, slots=True)
class Result:
    """What the guest did, with the VM stopped.

    Attributes:
        kvm: ``kvm`` or ``simulated``.
        passes: rounds done by the slowest vCPU.
        touched: pages verified by the guest.
        errors: words that the guest found wrong.
        pages, wrong: data pages looked at from outside, and wrong ones.
        first_problem: in words; empty where nothing is wrong.
        elapsed_s: since the VM was made.
    """

    kvm: str
    vcpus: int
    passes: int
    touched: int
    errors: int
    pages: int
    wrong: int
    first_problem: str
    elapsed_s: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        verdict = "RAM is right" if not self.wrong else f"{self.wrong} WRONG: {self.first_problem}"
        return (
            f"{self.kvm}: {self.vcpus} vCPUs did {self.passes} passes, verified {self.touched} pages in "
            f"{self.elapsed_s:.2f} s and found {self.errors} errors; {self.pages} pages checked from outside: {verdict}"
        )

    def raise_if_wrong(self) -> None:
        """Raises VerificationError."""
        if self.wrong:
            raise VerificationError(
                f"guest RAM is wrong: {self.first_problem}", "do not use this VM; keep its RAM file"
            )


def run(options: Options) -> Result | None:
    """Runs a VM until QMP's quit, SIGTERM, SIGINT, or the passes are done.

    Returns:
        What the guest did where `Options.passes` asked for an end.

    Raises:
        FarfaultError: the VM cannot be made, or a vCPU failed and no QMP client could look at it.
    """
    parameters = options.guest_parameters()
    install_kick_signal()
    with contextlib.ExitStack() as stack, _wake_on_signals() as wake:
        memory = GuestMemory(options.ram, options.size_bytes, Machine(options.machine))
        server = stack.enter_context(contextlib.closing(QmpServer(options.qmp))) if options.qmp else None
        if not options.incoming:
            load_guest(memory, parameters)
        simulated = _simulated(options, memory) if options.simulated else None
        attachment = _attachment(options, memory, simulated)
        if attachment is not None:
            stack.callback(attachment.client.close)
        vm = _machine(options, memory, simulated or RealVm(), attachment, server)
        stack.callback(vm.close)
        commands = QmpCommands(
            vm,
            server.emit if server is not None else _nobody_listens,
            attachment.may_save if attachment is not None else lambda: "",
            on_quit=wake.set,
        )
        stack.callback(commands.close)
        if not options.paused and not options.incoming:
            vm.resume()
        began_s = time.monotonic()
        _serve(vm, server, commands, wake, options.passes)
        if options.passes is None or wake.is_set:
            return None
        return _result(vm, parameters, time.monotonic() - began_s)


def _machine(
    options: Options, memory: GuestMemory, kvm: Vm, attachment: Attachment | None, server: QmpServer | None
) -> ReferenceVm:
    return ReferenceVm(
        kvm,
        memory,
        options.vcpus,
        kvmclock=options.kvmclock,
        incoming=options.incoming,
        make_far_faults=attachment.watch if attachment is not None else None,
        wake=attachment.client.wake if attachment is not None else lambda vcpu: None,
        on_event=server.emit if server is not None else lambda name: None,
    )


def _simulated(options: Options, memory: GuestMemory) -> SimulatedVm:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return SimulatedVm(
        [Backing(memory.base.hva, memory.size_bytes, memory.descriptor)],
        seed=options.seed,
        profile=PROFILES[options.profile],
        watched=options.attach is not None,
    )


def _attachment(options: Options, memory: GuestMemory, simulated: SimulatedVm | None) -> Attachment | None:
    if options.attach is None:
        return None
    if simulated is not None:
        return Attachment(options.attach, memory, FaultSource.SIMULATED, on_released=simulated.release)
    from farfault_shim.sources.choose import choose
    from farfault_shim.sources.host import find_host_facts

    candidates = (FaultSource.STOCK_NOWAIT, FaultSource.BLOCKING)
    choice = choose(find_host_facts(), options.fault_source, candidates)
    if choice.source is None:
        raise UsageError("this host has no fault source for a real VM", "see: farfault probe; or use --simulated")
    logger.info("fault source %s", choice.source.value)
    return Attachment(options.attach, memory, choice.source, choice.annotator)


class _Wake:
    """Ends the wait of `_serve`; a signal does too, whichever thread the kernel gave it to.

    Python runs its handlers on the main thread only, and a main thread that sleeps in poll(2) does not learn of a
    signal that another thread took: therefore `signal.set_wakeup_fd`.
    """

    def __init__(self) -> None:
        self.descriptor, self.writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.is_set = False

    def set(self) -> None:
        self.is_set = True
        with contextlib.suppress(BlockingIOError):
            os.write(self.writer, b"\0")

    def drain(self) -> None:
        """Forgets the wakes so far; `is_set` stays."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, WAKES_MAX)

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self.writer)


@contextlib.contextmanager
def _wake_on_signals() -> Iterator[_Wake]:
    wake = _Wake()

    def handle(number: int, frame: FrameType | None) -> None:
        wake.set()

    wakeup_before = signal.set_wakeup_fd(wake.writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield wake
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_before)
        wake.close()


def _serve(vm: ReferenceVm, server: QmpServer | None, commands: QmpCommands, wake: _Wake, passes: int | None) -> None:
    """Returns when the VM is to end."""
    while not wake.is_set:
        if vm.failure and (server is None or passes):
            raise FarfaultError(vm.failure, "see the log; the RAM file is as the guest left it")
        if server is None:
            select.select([wake.descriptor], [], [], WATCH_INTERVAL_S)
        elif server.wait(wake.descriptor, WATCH_INTERVAL_S if passes else None):
            server.serve_once(commands.run, commands.passed)
        wake.drain()
        if passes and _passes_done(vm) >= passes:
            return


def _passes_done(vm: ReferenceVm) -> int:
    try:
        return min(mailbox.passes for mailbox in read_mailboxes(vm.memory.descriptor, vm.vcpus))
    except ValueError:
        return 0  # the guest has not come so far


def _result(vm: ReferenceVm, parameters: GuestParameters, elapsed_s: float) -> Result:
    vm.pause()
    mailboxes = read_mailboxes(vm.memory.descriptor, vm.vcpus)
    check = verify_ram(vm.memory.descriptor, parameters, mailboxes)
    return Result(
        vm.kind,
        vm.vcpus,
        min(mailbox.passes for mailbox in mailboxes),
        total_touched(mailboxes),
        sum(mailbox.errors for mailbox in mailboxes),
        check.pages,
        check.wrong,
        check.problems[0] if check.problems else "",
        elapsed_s,
    )


def _nobody_listens(name: str, data: Mapping[str, Any] | None) -> None:
    """There is no QMP client without --qmp."""
