"""The two sides of a move against VMMs that misbehave at every step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from fake_qmp import GREETING, Drop, FakeVmm, Hang, Refuse, cont, fake_vmm, migrate_and_wait, migrate_as_qemu
from farfault_cli.errors import FarfaultError, PreflightError, UnreachableError
from farfault_vmm import connection, qmp
from farfault_vmm.connection import CommandError
from farfault_vmm.description import MemoryBackend, VmDescription
from farfault_vmm.qmp import QmpVmm

SHORT_S = 0.1
LONG_S = 10.0
MIB = 1 << 20


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[FakeVmm]:
    async with fake_vmm(tmp_path / "source") as fake:
        yield fake


@pytest.fixture
async def destination(tmp_path: Path) -> AsyncIterator[FakeVmm]:
    async with fake_vmm(tmp_path / "destination", status="inmigrate") as fake:
        yield fake


@pytest.fixture
def qemu(source: FakeVmm) -> FakeVmm:
    """A source that saves its VM while it runs."""
    source.greeting = json.dumps(GREETING).replace("fake", "qemu").encode() + b"\r\n"
    source.replies["migrate"] = migrate_as_qemu
    return source


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "COMMAND_TIMEOUT_S", SHORT_S)
    for name in ("EVENT_TIMEOUT_S", "SAVE_TIMEOUT_S", "LOAD_TIMEOUT_S", "QUIT_TIMEOUT_S"):
        monkeypatch.setattr(qmp, name, SHORT_S)


async def saved(vmm: QmpVmm) -> bytes:
    return b"".join([chunk async for chunk in vmm.suspend()])


async def one_chunk(data: bytes = b"state") -> AsyncIterator[bytes]:
    yield data


# ---- both sides ----------------------------------------------------------------------------------


async def test_describe(source: FakeVmm) -> None:
    async with await QmpVmm.connect(source.path) as vmm:
        await vmm.prepare_source()
        assert await vmm.describe() == VmDescription(
            vmm="fake 1.2.3",
            machine_type="fake-board-1.2",
            vcpus=2,
            status="running",
            memory=(MemoryBackend("ram", 128 * MIB, shared=True), MemoryBackend("", MIB, shared=False)),
            capabilities=("events", "x-ignore-shared"),
            accelerator="tcg",
        )


@pytest.mark.parametrize(
    ("command", "reply"), [("query-memdev", [{"id": "ram"}]), ("query-kvm", None), ("query-cpus-fast", 7)]
)
async def test_describe_nonsense(source: FakeVmm, command: str, reply: object) -> None:
    source.replies[command] = reply
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(FarfaultError, match="describes itself in a way that is not QMP"):
            await vmm.describe()


async def test_vmm_that_cannot_leave_memory_out(source: FakeVmm, destination: FakeVmm) -> None:
    for fake in (source, destination):
        del fake.capabilities["x-ignore-shared"]
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(PreflightError, match="can not leave shared memory out"):
            await vmm.prepare_source()
        with pytest.raises(PreflightError, match="can not leave shared memory out"):
            await saved(vmm)
    async with await QmpVmm.connect(destination.path) as vmm:
        with pytest.raises(PreflightError, match="can not leave shared memory out"):
            await vmm.prepare_destination()
    assert source.status == "running"


@pytest.mark.usefixtures("short_waits")
async def test_start_that_does_not_come(source: FakeVmm) -> None:
    source.status = "paused"
    source.replies["cont"] = {}
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(UnreachableError, match="start of the vCPUs did not happen"):
            await vmm.cont()


async def test_start_of_a_vm_that_runs(source: FakeVmm) -> None:
    source.replies["cont"] = {}
    async with await QmpVmm.connect(source.path) as vmm:
        assert await vmm.cont() > 0


async def test_start_is_tried_again_while_a_migration_is_tidied_up(source: FakeVmm) -> None:
    source.status = "finish-migrate"
    refusals = iter(range(3))

    def cont_later(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
        return Refuse("Migration is not finalized yet") if next(refusals, None) is not None else cont(vmm, arguments)

    source.replies["cont"] = cont_later
    async with await QmpVmm.connect(source.path) as vmm:
        assert await vmm.cont() > 0
    assert source.commands.count("cont") == 4


async def test_start_that_is_refused(source: FakeVmm) -> None:
    source.status = "internal-error"
    source.replies["cont"] = Refuse("Resetting the Virtual Machine is required")
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(CommandError, match="Resetting"):
            await vmm.cont()


@pytest.mark.usefixtures("short_waits")
async def test_quit_that_does_not_end(source: FakeVmm) -> None:
    source.replies["quit"] = {}
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(UnreachableError, match="did not end"):
            await vmm.quit()


# ---- source --------------------------------------------------------------------------------------


async def test_suspend_yields_the_state_of_the_stopped_vm(source: FakeVmm) -> None:
    async with await QmpVmm.connect(source.path) as vmm:
        assert vmm.stopped_unix_us is None
        async for chunk in vmm.suspend():
            assert 0 < len(chunk) <= qmp.CHUNK_BYTES_MAX
            assert vmm.stopped_unix_us
            assert source.status != "running"
        assert source.status == "postmigrate"
        await vmm.resume()
        assert source.status == "running"
        assert await saved(vmm) == source.device_state


async def test_suspend_stops_late_and_asks_little_while_stopped(source: FakeVmm) -> None:
    """Whatever can be done while the VM runs is done before `stop`; then nothing but `migrate` is needed."""
    async with await QmpVmm.connect(source.path) as vmm:
        await saved(vmm)
    assert source.commands[-2:] == ["stop", "migrate"]


async def test_qemu_saves_while_the_vm_runs_and_nothing_is_passed_on_before_it_stands_still(qemu: FakeVmm) -> None:
    async def stop_later() -> None:
        await qemu.half_sent.wait()
        for _ in range(10):  # for whoever would pass it on
            await asyncio.sleep(0)
        qemu.may_stop.set()

    async with await QmpVmm.connect(qemu.path) as vmm:
        stopping = asyncio.create_task(stop_later())
        state = b""
        async for chunk in vmm.suspend():
            assert qemu.may_stop.is_set()
            assert qemu.status != "running"
            state += chunk
        await stopping
        assert state == qemu.device_state
        assert qemu.status == "postmigrate"
        assert vmm.stopped_unix_us
    assert "stop" not in qemu.commands


@pytest.mark.parametrize("limit", ["STOP_AFTER_S", "EARLY_BYTES_MAX"])
async def test_a_vm_that_qemu_does_not_stop_is_stopped(
    qemu: FakeVmm, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmp, limit, SHORT_S if limit == "STOP_AFTER_S" else 1)
    async with await QmpVmm.connect(qemu.path) as vmm:
        assert await saved(vmm) == qemu.device_state
    assert qemu.commands[-2:] == ["migrate", "stop"]


async def test_a_paused_vm_of_qemu_is_saved_as_it_is(qemu: FakeVmm) -> None:
    qemu.status = "paused"
    async with await QmpVmm.connect(qemu.path) as vmm:
        assert await saved(vmm) == qemu.device_state
        assert vmm.stopped_unix_us
    assert qemu.commands[-1] == "migrate"


async def test_a_save_that_fails_before_the_vm_has_stopped_tells_why(qemu: FakeVmm) -> None:
    def fail(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
        vmm.descriptors.pop("farfault-state").close()
        vmm.migration_event("failed")
        return {}

    qemu.replies["migrate"], qemu.error = fail, "a device is unwell"
    async with await QmpVmm.connect(qemu.path) as vmm:
        with pytest.raises(FarfaultError, match="could not save its device state: a device is unwell"):
            await saved(vmm)
    assert qemu.status == "running"
    assert "cont" not in qemu.commands


async def test_leaving_early_resumes(source: FakeVmm) -> None:
    source.replies["migrate"] = migrate_and_wait
    async with await QmpVmm.connect(source.path) as vmm:
        async with aclosing(vmm.suspend()) as chunks:
            await anext(chunks)
        assert source.status == "running"
        assert source.migration == "cancelled"


async def test_cancellation_resumes(source: FakeVmm) -> None:
    source.replies["migrate"] = migrate_and_wait
    async with await QmpVmm.connect(source.path) as vmm:
        first = asyncio.Event()

        async def consume() -> None:
            async for _ in vmm.suspend():
                first.set()

        consumer = asyncio.create_task(consume())
        await asyncio.wait_for(first.wait(), LONG_S)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        assert source.status == "running"


async def test_paused_vm_stays_paused(source: FakeVmm) -> None:
    source.status = "paused"
    source.replies["migrate"] = migrate_and_wait
    async with await QmpVmm.connect(source.path) as vmm:
        async with aclosing(vmm.suspend()) as chunks:
            await anext(chunks)
        assert vmm.stopped_unix_us
    assert source.status == "paused"


async def test_blocked_migration_resumes(source: FakeVmm) -> None:
    source.replies["migrate"] = Refuse("disk 'd0' does not support migration")
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(CommandError, match="does not support migration"):
            await saved(vmm)
    assert source.status == "running"


async def test_failed_save_tells_why_and_resumes(source: FakeVmm) -> None:
    source.ends_as, source.error = "failed", "a device is unwell"
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(FarfaultError, match="could not save its device state: a device is unwell"):
            await saved(vmm)
    assert source.status == "running"


async def test_failed_save_without_a_reason(source: FakeVmm) -> None:
    source.ends_as = "failed"
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(FarfaultError, match="the migration ended as 'failed'"):
            await saved(vmm)


async def test_state_with_ram_in_it(source: FakeVmm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "DEVICE_STATE_BYTES_MAX", len(source.device_state) - 1)
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(FarfaultError, match="RAM travels in it"):
            await saved(vmm)
    assert source.status == "running"


@pytest.mark.usefixtures("short_waits")
@pytest.mark.parametrize(
    ("command", "reply", "message"),
    [
        ("stop", Hang(), "stop of the vCPUs did not happen|did not answer 'stop'"),
        ("stop", {}, "stop of the vCPUs did not happen"),
        ("migrate", migrate_and_wait, "wrote no device state"),
    ],
)
async def test_save_that_hangs_resumes(source: FakeVmm, command: str, reply: object, message: str) -> None:
    source.replies[command] = reply
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(FarfaultError, match=message):
            await saved(vmm)
    assert source.status == "running"


@pytest.mark.parametrize("command", ["getfd", "stop", "migrate"])
async def test_source_that_ends(source: FakeVmm, command: str, caplog: pytest.LogCaptureFixture) -> None:
    source.replies[command] = Drop()
    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(UnreachableError, match="closed its QMP connection"):
            await saved(vmm)
    assert ("could not be started again" in caplog.text) == (command != "getfd")


async def test_cancel_waits_for_the_end(source: FakeVmm) -> None:
    """`cancelling` is not the end: the memory may still change hands."""

    def cancel_slowly(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
        if vmm.migration == "active":
            vmm.migration_event("cancelling")
            asyncio.get_running_loop().call_soon(vmm.cancel_transfer)
        return {}

    source.replies["migrate"], source.replies["migrate_cancel"] = migrate_and_wait, cancel_slowly
    async with await QmpVmm.connect(source.path) as vmm, aclosing(vmm.suspend()) as chunks:
        await anext(chunks)
        await vmm.cancel()
        assert source.migration == "cancelled"
        await vmm.cancel()
        assert source.status == "paused"


async def test_resume_of_a_vm_that_runs_does_nothing(source: FakeVmm) -> None:
    async with await QmpVmm.connect(source.path) as vmm:
        await vmm.resume()
    assert "cont" not in source.commands


# ---- destination ---------------------------------------------------------------------------------


async def test_load_then_cont(destination: FakeVmm) -> None:
    listens = []

    async def chunks() -> AsyncIterator[bytes]:
        listens.append("migrate-incoming" in destination.commands)
        for _ in range(10):
            yield bytes(MIB)

    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        await vmm.load(chunks())
        assert listens == [True], "the source is stopped only when the destination listens"
        assert destination.device_state == bytes(10 * MIB)
        assert destination.status == "paused"
        assert "cont" not in destination.commands
        assert await vmm.cont() > 0


async def test_destination_that_does_not_wait(source: FakeVmm) -> None:
    asked = []

    async def chunks() -> AsyncIterator[bytes]:
        asked.append(True)
        yield b""

    async with await QmpVmm.connect(source.path) as vmm:
        with pytest.raises(PreflightError, match="its status is 'running'"):
            await vmm.prepare_destination()
        with pytest.raises(FarfaultError, match="'-incoming' was not specified"):
            await vmm.load(chunks())
    assert not asked, "the source was not even stopped"


async def test_load_that_fails_tells_why(destination: FakeVmm) -> None:
    destination.ends_as, destination.error = "failed", "x-ignore-shared is off"
    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        with pytest.raises(FarfaultError, match="did not load the device state: x-ignore-shared is off") as caught:
            await vmm.load(one_chunk())
    assert "-incoming defer" in caught.value.remedy


async def test_load_that_fails_while_the_source_still_sends(destination: FakeVmm) -> None:
    """The reason is the VMM's, not the broken socket that follows from it."""

    async def fail(state: object) -> None:
        raise OSError("bad state")

    def incoming(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
        vmm.start(fail, arguments)
        return {}

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(MIB)
        await asyncio.Event().wait()

    destination.replies["migrate-incoming"], destination.error = incoming, "bad state"
    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        with pytest.raises(FarfaultError, match="did not load the device state: bad state"):
            await vmm.load(chunks())


async def test_load_that_fails_lets_the_source_run_on(source: FakeVmm, destination: FakeVmm) -> None:
    async def fail(state: object) -> None:
        raise OSError("bad state")

    def incoming(vmm: FakeVmm, arguments: Mapping[str, Any]) -> object:
        vmm.start(fail, arguments)
        return {}

    destination.replies["migrate-incoming"], source.replies["migrate"] = incoming, migrate_and_wait
    async with await QmpVmm.connect(source.path) as ours, await QmpVmm.connect(destination.path) as theirs:
        await theirs.prepare_destination()
        chunks = ours.suspend()
        with pytest.raises(FarfaultError, match="did not load"):
            await theirs.load(chunks)
        assert source.status == "running"


async def test_vmm_that_ends_while_it_loads(destination: FakeVmm) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"half"
        destination.drop()
        await asyncio.Event().wait()

    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        with pytest.raises(FarfaultError, match="told why only in its log"):
            await vmm.load(chunks())


async def test_source_that_fails_while_the_destination_loads(destination: FakeVmm) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"half"
        raise FarfaultError("the network is gone")

    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        with pytest.raises(FarfaultError, match="the network is gone"):
            await vmm.load(chunks())


async def test_vm_that_starts_on_its_own(destination: FakeVmm) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"all"
        destination.event("RESUME")

    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        with pytest.raises(FarfaultError, match="started on its own"):
            await vmm.load(chunks())


@pytest.mark.usefixtures("short_waits")
async def test_load_that_hangs(destination: FakeVmm) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"half"
        await asyncio.Event().wait()

    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        with pytest.raises(FarfaultError, match=r"did not happen in|took longer than"):
            await vmm.load(chunks())


async def test_cancelled_load_leaves_nothing_behind(destination: FakeVmm) -> None:
    began = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        yield b"half"
        began.set()
        await asyncio.Event().wait()

    async with await QmpVmm.connect(destination.path) as vmm:
        await vmm.prepare_destination()
        loading = asyncio.create_task(vmm.load(chunks()))
        await asyncio.wait_for(began.wait(), LONG_S)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not names & {"feed device state", "load device state"}
