"""What a receiver does where the one before it was interrupted: each row of docs/recovery.md's two half states."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from farfault_cli.errors import (
    FarfaultError,
    GuestWaitsError,
    RolledBackError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from farfault_client.receive import recovery as recovery_module
from farfault_client.receive.destination import Destination
from farfault_client.receive.endings import outcome, told_to_end
from farfault_client.receive.journal import Journal, Record, Step
from farfault_client.receive.pager import Pager
from farfault_client.receive.recovery import Recovery
from farfault_client.receive.removed_log import RemovedLog
from farfault_client.receive.source import SourceVm
from farfault_client.session.connect import session_config
from farfault_client.session.lease import Lease, LeaseKey
from farfault_client.session.session import Session
from farfault_shim.layout import Layout, PageIndex, PageRun

TARGET = "source.example:7777"
PAGE_BYTES = 4096
PAGES = 64
LAYOUT = Layout([(PAGES * PAGE_BYTES, PAGE_BYTES)])
GENERATION = 7
HANDED_OVER = FarfaultError("the VM was handed over")


class FakeSession(Session):
    """Opens without a page server.

    Attributes:
        failures: raised by the next calls of `open`, first one first.
        asked: generation that each call of `open` expected.
    """

    def __init__(self) -> None:
        super().__init__(session_config(TARGET, insecure=True))
        self.failures: list[FarfaultError] = []
        self.asked: list[int] = []

    async def open(self, resume: LeaseKey | None = None) -> Lease:
        assert resume is not None
        self.asked.append(resume.generation)
        if self.failures:
            raise self.failures.pop(0)
        self.lease = Lease(resume.lease_id, resume.token, GENERATION, LAYOUT)
        return self.lease


class FakeSource(SourceVm):
    """A page server's word.

    Attributes:
        is_handed_over: as its record says; Resume is refused then.
        is_rolled_back: HandOver is refused.
        calls: what it was asked.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.is_handed_over = self.is_rolled_back = False
        self.calls: list[str] = []

    @contextlib.asynccontextmanager
    async def held(self, *, at_once: bool = False) -> AsyncIterator[None]:
        self.calls.append("held at once" if at_once else "held")
        yield
        self.calls.append("held no longer")

    async def resume(self) -> None:
        self.calls.append("resume")
        if self.is_handed_over:
            raise HANDED_OVER

    async def hand_over(self, generation: int) -> None:
        self.calls.append(f"hand over {generation}")
        if self.is_rolled_back:
            raise FarfaultError("the VM runs")
        self.is_handed_over = True


class FakeVmm:
    """The destination VMM: its state, and what it was told."""

    def __init__(self, status: str) -> None:
        self.state = status
        self.calls: list[str] = []

    async def status(self) -> str:
        return self.state

    async def cont(self) -> int:
        self.calls.append("cont")
        return 1

    async def quit(self) -> None:
        self.calls.append("quit")


class FakeDestination(Destination):
    """`found` is what connecting finds; None: nobody listens."""

    def __init__(self, found: FakeVmm | None) -> None:
        super().__init__(Path("/run/qmp"))
        self.found = found

    async def connect(self) -> Any:
        if self.found is None:
            raise UnreachableError("no VMM listens on /run/qmp")
        self.vmm = self.found  # type: ignore[assignment]
        return self.vmm


class Host:
    """A destination host after the death of its receiver."""

    def __init__(self, folder: Path, step: Step, vmm: FakeVmm | None = None) -> None:
        self.journal = Journal(folder)
        self.journal.write(Record(step, TARGET, "lease", "secret", GENERATION))
        self.session = FakeSession()
        self.session.lease = Lease("lease", "secret", GENERATION, LAYOUT)
        self.source = FakeSource(self.session)
        self.vmm = vmm
        self.removed = RemovedLog(folder / "removed")
        self.attached = asyncio.Event()
        self.recovery = Recovery(
            self.session, self.source, FakeDestination(vmm), self.journal, self.removed, self.attached
        )

    @property
    def step(self) -> Step:
        assert self.journal.record is not None
        return self.journal.record.step


# ---- the record ----------------------------------------------------------------------------------


async def test_a_move_that_was_rolled_back_is_none(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.ROLLED_BACK)
    assert host.recovery.find() is None
    assert host.recovery.find() is None
    assert Journal(tmp_path).record is None


async def test_a_move_from_another_page_server_is_not_taken_up(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.RUNNING)
    host.journal.write(Record(Step.RUNNING, "another:7777", "lease", "secret", GENERATION))
    with pytest.raises(UsageError, match=r"of a move from another:7777, not from source\.example:7777"):
        host.recovery.find()
    assert Journal(tmp_path).record is not None


@pytest.mark.parametrize("step", [step for step in Step if step is not Step.ROLLED_BACK])
async def test_any_other_move_is_taken_up(tmp_path: Path, step: Step) -> None:
    host = Host(tmp_path, step)
    assert host.recovery.find() == host.journal.record


# ---- the lease -----------------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def sleep(_: float) -> None:
        return

    monkeypatch.setattr(recovery_module.asyncio, "sleep", sleep)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("step", [Step.HANDING_OVER, Step.RUNNING, Step.WRONG, Step.COMPLETED])
async def test_a_guest_that_may_wait_here_is_worth_asking_for_again(tmp_path: Path, step: Step) -> None:
    host = Host(tmp_path, step)
    host.session.failures = [UnreachableError("no answer")] * 3
    assert host.journal.record is not None
    await host.recovery.reopen(host.journal.record)
    assert len(host.session.asked) == 4


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("step", [Step.OPENED, Step.SUSPENDING])
async def test_nobody_waits_before_the_hand_over(tmp_path: Path, step: Step) -> None:
    host = Host(tmp_path, step)
    host.session.failures = [UnreachableError("no answer")]
    assert host.journal.record is not None
    with pytest.raises(UnreachableError):
        await host.recovery.reopen(host.journal.record)


@pytest.mark.parametrize(
    ("step", "expected"), [(Step.SUSPENDING, 0), (Step.HANDING_OVER, 0), (Step.RUNNING, GENERATION)]
)
async def test_another_generation_is_only_refused_once_the_vm_has_run_here(
    tmp_path: Path, step: Step, expected: int
) -> None:
    host = Host(tmp_path, step)
    assert host.journal.record is not None
    await host.recovery.reopen(host.journal.record)
    assert host.session.asked == [expected]
    assert host.session.key.generation == GENERATION, "its pages are refused all the same"


# ---- who owns the VM -----------------------------------------------------------------------------


@pytest.mark.parametrize("step", [Step.OPENED, Step.SUSPENDING])
async def test_before_the_hand_over_the_source_runs_again(tmp_path: Path, step: Step) -> None:
    host = Host(tmp_path, step)
    with pytest.raises(RolledBackError):
        await host.recovery.settle(step)
    assert host.source.calls == ["resume"]
    assert host.step is Step.ROLLED_BACK


@pytest.mark.parametrize(("was_handed_over", "status"), [(False, "paused"), (True, "paused"), (True, "running")])
async def test_a_destination_that_holds_the_vm_gets_it(tmp_path: Path, was_handed_over: bool, status: str) -> None:
    """Its receiver died before it asked, before it was answered, or before it wrote down that the VM runs."""
    host = Host(tmp_path, Step.HANDING_OVER, FakeVmm(status))
    host.source.is_handed_over = was_handed_over
    settling = asyncio.ensure_future(host.recovery.settle(Step.HANDING_OVER))
    await asyncio.sleep(0)
    assert not settling.done()
    assert host.source.calls == ["held at once"], "its pages could not be served yet"
    host.attached.set()
    await settling
    calls = [call for call in host.source.calls if "held" not in call]
    assert calls == [f"hand over {GENERATION}"]
    assert host.vmm is not None
    assert host.vmm.calls == ["cont"]
    assert host.step is Step.RUNNING


@pytest.mark.parametrize("vmm", [None, "inmigrate"])
async def test_a_destination_without_the_vm_gives_it_back(tmp_path: Path, vmm: str | None) -> None:
    host = Host(tmp_path, Step.HANDING_OVER, FakeVmm(vmm) if vmm else None)
    with pytest.raises(RolledBackError):
        await host.recovery.settle(Step.HANDING_OVER)
    assert host.source.calls == ["resume"]
    assert host.step is Step.ROLLED_BACK
    assert host.vmm is None or host.vmm.calls == ["quit"]


@pytest.mark.parametrize("vmm", [None, "inmigrate"])
async def test_a_destination_that_lost_the_vm_after_the_hand_over_says_so(tmp_path: Path, vmm: str | None) -> None:
    host = Host(tmp_path, Step.HANDING_OVER, FakeVmm(vmm) if vmm else None)
    host.source.is_handed_over = True
    with pytest.raises(FarfaultError, match="the source VM stays stopped: the VM was handed over") as caught:
        await host.recovery.settle(Step.HANDING_OVER)
    assert host.step is Step.HANDING_OVER
    assert isinstance(outcome(host.journal, caught.value), GuestWaitsError)


async def test_a_source_that_was_rolled_back_meanwhile_keeps_the_vm(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.HANDING_OVER, FakeVmm("paused"))
    host.source.is_rolled_back = True
    host.attached.set()
    with pytest.raises(RolledBackError):
        await host.recovery.settle(Step.HANDING_OVER)
    assert host.vmm is not None
    assert host.vmm.calls == ["quit"], "it must never run"
    assert host.step is Step.ROLLED_BACK


@pytest.mark.parametrize(("status", "calls"), [("paused", ["cont"]), ("postmigrate", ["cont"]), ("running", [])])
async def test_a_vm_that_is_ours_runs(tmp_path: Path, status: str, calls: list[str]) -> None:
    host = Host(tmp_path, Step.RUNNING, FakeVmm(status))
    host.attached.set()
    await host.recovery.settle(Step.RUNNING)
    assert host.vmm is not None
    assert host.vmm.calls == calls
    assert host.source.calls == []


async def test_a_vmm_that_was_started_anew_holds_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.RUNNING, FakeVmm("inmigrate"))
    with pytest.raises(GuestWaitsError, match="started anew"):
        await host.recovery.settle(Step.RUNNING)
    assert host.step is Step.RUNNING


async def test_memory_that_was_found_wrong_stays_wrong(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.WRONG)
    with pytest.raises(VerificationError):
        await host.recovery.settle(Step.WRONG)
    assert host.step is Step.WRONG


async def test_a_vmm_that_was_released_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_module, "RELEASE_ATTACH_TIMEOUT_S", 0.0)
    host = Host(tmp_path, Step.COMPLETED)
    await host.recovery.settle(Step.COMPLETED)
    assert host.step is Step.COMPLETED


# ---- memory --------------------------------------------------------------------------------------


class FakeAttached:
    """As much of an attached VMM as a rebuild looks at."""

    def __init__(self, layout: Layout, ram_fd: int) -> None:
        self.layout, self.ram_fds = layout, [ram_fd]


async def test_installed_pages_are_those_that_the_kernel_has(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.RUNNING)
    pager = Pager(host.session)
    host.removed.append(PageRun(PageIndex(20), 4))
    with open("/dev/shm/farfault-test-recovery", "w+b", buffering=0) as ram:  # noqa: PTH123 - tmpfs has holes
        Path(ram.name).unlink()
        ram.truncate(LAYOUT.size_bytes)
        for page in (0, 1, 21, PAGES - 1):
            ram.seek(page * PAGE_BYTES)
            ram.write(b"x" * PAGE_BYTES)
        host.recovery.rebuild(pager, FakeAttached(LAYOUT, ram.fileno()))  # type: ignore[arg-type]
    settled = [page for page in range(PAGES) if pager.engine.pages.is_settled(page)]
    assert settled == [0, 1, 20, 21, 22, 23, PAGES - 1]


async def test_a_vmm_of_another_size_is_left_to_attach_which_refuses_it(tmp_path: Path) -> None:
    host = Host(tmp_path, Step.RUNNING)
    pager = Pager(host.session)
    host.recovery.rebuild(pager, FakeAttached(Layout([(PAGE_BYTES, PAGE_BYTES)]), -1))  # type: ignore[arg-type]
    assert pager.engine.settled_pages == 0


# ---- words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", Step)
async def test_being_told_to_end_means_what_the_record_says(tmp_path: Path, step: Step) -> None:
    ended = told_to_end(Host(tmp_path, step).journal)
    may_be_here = step in (Step.HANDING_OVER, Step.RUNNING, Step.WRONG, Step.COMPLETED)
    assert isinstance(ended, GuestWaitsError) is may_be_here
    assert ("nothing was moved" in ended.problem) is not may_be_here


def test_without_a_record_nothing_was_moved(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert not journal.vm_may_be_here
    assert "nothing was moved" in told_to_end(journal).problem
    error = UnreachableError("no answer")
    assert outcome(journal, error) is error
