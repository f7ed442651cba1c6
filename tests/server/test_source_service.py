"""Suspend, hand over, resume: the record comes first, and the VM is never lost and never runs twice."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import xxhash
from farfault.v1 import pages_pb2 as pb
from farfault_cli.errors import FarfaultError, UsageError
from farfault_server.leases.book import LeaseBook
from farfault_server.leases.phases import Phase
from farfault_server.leases.refusals import RefusedError
from farfault_server.leases.store import MemoryStore
from farfault_server.source_vm import STILL_S_MAX, VmOwner
from farfault_vmm.description import MemoryBackend, VmDescription
from server_client import (
    PAGE,
    TIMEOUT_S,
    Client,
    Express,
    connected,
    eventually,
    page,
    refused,
    request,
    serving,
    write_ram,
)

STATE = [b"device " * 1000, b"state", b"x" * 100_000]
DESCRIPTION = VmDescription(
    vmm="fake 1.0",
    machine_type="none",
    vcpus=1,
    status="running",
    memory=(MemoryBackend("ram", 4 * PAGE, True),),
    capabilities=(),
    accelerator="none",
)


class FakeVmm:
    """A VMM that remembers what was done to it."""

    def __init__(self, chunks: list[bytes] | None = None, fails: bool = False) -> None:
        self.chunks = STATE if chunks is None else chunks
        self.fails = fails
        self.is_running = True
        self.stopped_unix_us: int | None = None
        self.started_unix_us = 0
        self.started = asyncio.Event()
        self.starts = 0
        self.questions = 0
        self.record: RecordingStore | None = None
        self.resume_fails = False

    async def wait_started(self) -> None:
        await self.started.wait()
        self.started.clear()

    async def describe(self) -> VmDescription:
        return DESCRIPTION

    async def prepare_source(self) -> None:
        pass

    async def suspend(self) -> AsyncIterator[bytes]:
        if self.record is not None:
            assert self.record.phases[-1] is Phase.SUSPENDING, "stopped before the record said so"
        self.is_running = False
        self.stopped_unix_us = 1234
        for chunk in self.chunks:
            await asyncio.sleep(0)
            yield chunk
        if self.fails:
            raise FarfaultError("the device cannot be saved", "unplug it")

    async def resume(self) -> None:
        if self.resume_fails:
            raise FarfaultError("the VMM does not answer")
        if self.record is not None:
            assert self.record.phases[-1] is Phase.RESUMING
        self.starts += not self.is_running
        self.is_running = True

    async def status(self) -> str:
        self.questions += 1
        return "running" if self.is_running else "postmigrate"

    async def close(self) -> None:
        pass

    def start_past_the_server(self) -> None:
        """As somebody else's `cont` on another QMP connection, of which the VMM tells everybody."""
        self.is_running = True
        assert self.stopped_unix_us is not None
        self.started_unix_us = max(self.started_unix_us, self.stopped_unix_us) + 1
        self.started.set()


class RecordingStore(MemoryStore):
    """Remembers every record; `load` gives the last one, as after a restart."""

    def __init__(self) -> None:
        self.books: list[LeaseBook] = []
        self.fails = False
        self.fails_at: Phase | None = None
        self.waits_at: Phase | None = None
        self.may_save = threading.Event()
        self.may_save.set()

    @property
    def phases(self) -> list[Phase]:
        return [book.phase for book in self.books]

    def load(self) -> LeaseBook | None:
        return self.books[-1] if self.books else None

    def save(self, book: LeaseBook) -> None:
        if self.fails or book.phase is self.fails_at:
            raise OSError(28, "No space left on device")
        if book.phase is self.waits_at:
            self.waits_at = None
            self.may_save.clear()
        assert self.may_save.wait(TIMEOUT_S)
        self.books.append(book)


@pytest.fixture
def ram(tmp_path):
    return write_ram(tmp_path / "vm.ram", [page(number) for number in range(4)])


@pytest.fixture
def store():
    return RecordingStore()


@pytest.fixture
def vmm(store):
    vmm = FakeVmm()
    vmm.record = store
    return vmm


async def suspend(client: Client, resume_after_ms: int = 0) -> pb.DeviceStateChunk:
    """The last chunk, after the whole state was checked and recorded."""
    data, last = b"", pb.DeviceStateChunk()
    request = pb.SuspendRequest(resume_after_ms=resume_after_ms)
    async for chunk in client.source.Suspend(request, metadata=client.metadata, timeout=TIMEOUT_S):
        assert not last.last
        data, last = data + chunk.data, chunk
    assert last.last
    assert data == b"".join(STATE)
    assert last.checksum == xxhash.xxh3_64_intdigest(data)
    assert last.stopped_unix_us == 1234
    return last


async def suspend_until_last(client: Client) -> pb.DeviceStateChunk:
    """The last chunk, while it may be being recorded; then the client leaves, as older ones do."""
    async for chunk in client.source.Suspend(pb.SuspendRequest(), metadata=client.metadata, timeout=TIMEOUT_S):
        if chunk.last:
            return chunk
    raise AssertionError("no last chunk")


async def hand_over(client: Client, generation: int) -> None:
    request = pb.HandOverRequest(generation=generation)
    await client.source.HandOver(request, metadata=client.metadata, timeout=TIMEOUT_S)


async def hold(client: Client, resume_after_ms: int = 0) -> None:
    request = pb.HoldRequest(resume_after_ms=resume_after_ms)
    await client.source.Hold(request, metadata=client.metadata, timeout=TIMEOUT_S)


async def resume(client: Client) -> None:
    await client.source.Resume(pb.ResumeRequest(), metadata=client.metadata, timeout=TIMEOUT_S)


async def release(client: Client) -> None:
    await client.pages.Release(pb.ReleaseRequest(), metadata=client.metadata, timeout=TIMEOUT_S)


async def test_a_move(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store, background_port=0) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        assert opened.vm_state == pb.VM_STATE_RUNNING
        assert await client.fetch((0, 0, 1)) == ["NOT_FROZEN"]
        async with connected(client.lane(pb.LANE_KIND_BACKGROUND)) as side:
            side.opened = opened
            assert await side.fetch((0, 0, 1), name="Background") == ["NOT_FROZEN"]
            last = await suspend(client)
            assert last.generation != opened.generation
            assert not vmm.is_running
            assert await client.fetch((0, 0, 1)) == [page(0)]
            assert await side.fetch((0, 0, 1), name="Background") == [page(0)]
            for _ in range(2):
                await hand_over(client, last.generation)
            assert (await refused(resume(client)))[0] is grpc.StatusCode.FAILED_PRECONDITION
            assert (await refused(release(client)))[0] is grpc.StatusCode.FAILED_PRECONDITION
            assert await side.fetch((0, 1, 1), name="Background") == [page(1)]
        complete = pb.CompleteRequest(generation=last.generation)
        for _ in range(2):
            await client.pages.Complete(complete, metadata=client.metadata, timeout=TIMEOUT_S)
        await release(client)
        assert (await refused(client.open(pb.LEASE_KIND_MIGRATION)))[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert not vmm.is_running
    assert vmm.starts == 0
    wanted = [Phase.SUSPENDING, Phase.FROZEN, Phase.HANDED_OVER, Phase.COMPLETED]
    assert [phase for phase in dict.fromkeys(store.phases) if phase is not Phase.RUNNING] == wanted


async def test_roll_back(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store, background_port=0) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        await resume(client)  # it runs: nothing to do
        first = await suspend(client)
        code, message = await refused(suspend(client))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "Resume first" in message
        for _ in range(2):
            await resume(client)
        assert vmm.is_running
        assert vmm.starts == 1
        assert await client.fetch((0, 0, 1)) == ["NOT_FROZEN"]
        async with connected(client.lane(pb.LANE_KIND_BACKGROUND)) as side:
            side.opened = opened
            assert await side.fetch((0, 0, 1), name="Background") == ["NOT_FROZEN"]
        assert (await refused(hand_over(client, first.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        second = await suspend(client)
        assert (await refused(hand_over(client, first.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        await hand_over(client, second.generation)


async def test_release_lets_a_suspended_vm_run(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        await suspend(client)
        for _ in range(2):
            await release(client)
        assert vmm.is_running
        await client.open(pb.LEASE_KIND_MIGRATION)


async def test_a_clone_lease_touches_nothing(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_CLONE)
        assert (await refused(suspend(client)))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert (await refused(resume(client)))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert (await refused(hand_over(client, 1)))[0] is grpc.StatusCode.PERMISSION_DENIED
        await release(client)
    assert vmm.starts == 0


async def test_a_client_that_leaves_during_suspend_lets_the_vm_run(ram):
    vmm = FakeVmm([bytes(256 << 10)] * 200)  # more than flow control lets through unread
    async with serving(ram, vmm=vmm) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        call = client.source.Suspend(pb.SuspendRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        await call.read()
        assert not vmm.is_running
        call.cancel()
        await eventually(lambda: vmm.is_running and server.keeper.book.phase is Phase.RUNNING)
        assert await client.fetch((0, 0, 1)) == ["NOT_FROZEN"]


async def test_a_hand_over_waits_for_the_record_of_the_device_state(ram, vmm, store):
    """The destination may have loaded it while the server still saves."""
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        store.waits_at = Phase.FROZEN
        last = await suspend_until_last(client)
        handing_over = asyncio.ensure_future(hand_over(client, last.generation))
        await eventually(lambda: not store.may_save.is_set())
        await asyncio.sleep(0.05)
        assert not handing_over.done()
        assert store.phases[-1] is Phase.SUSPENDING
        store.may_save.set()
        await handing_over
    assert store.phases[-2:] == [Phase.FROZEN, Phase.HANDED_OVER]
    assert vmm.starts == 0


async def test_device_state_whose_record_cannot_be_saved_is_rolled_back(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        store.fails_at = Phase.FROZEN
        last = await suspend_until_last(client)
        assert (await refused(hand_over(client, last.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert server.keeper.book.phase is Phase.RUNNING
    assert vmm.starts == 1


async def test_a_server_that_is_killed_before_it_recorded_the_device_state(ram, vmm, store):
    """The destination holds it all, and is refused."""
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client)
    while store.phases[-1] is not Phase.SUSPENDING:
        store.books.pop()
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as again:
        again.opened = client.opened
        assert server.keeper.book.phase is Phase.RUNNING
        assert (await refused(hand_over(again, last.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert vmm.starts == 1


async def test_a_suspend_that_fails_lets_the_vm_run(ram):
    vmm = FakeVmm(fails=True)
    async with serving(ram, vmm=vmm) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        code, message = await refused(suspend(client))
        assert code is grpc.StatusCode.INTERNAL
        assert message == "the device cannot be saved\n  remedy: unplug it"
        assert vmm.is_running
        assert server.keeper.book.phase is Phase.RUNNING


async def test_a_record_that_cannot_be_saved_stops_nothing(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        store.fails = True
        code, message = await refused(suspend(client))
        assert code is grpc.StatusCode.INTERNAL
        assert "lease record" in message
        assert vmm.is_running
        store.fails = False
        last = await suspend(client)
        store.fails = True
        assert (await refused(hand_over(client, last.generation)))[0] is grpc.StatusCode.INTERNAL
        assert server.keeper.book.phase is Phase.FROZEN
        store.fails = False
        await hand_over(client, last.generation)


async def test_a_record_that_cannot_be_saved_at_the_start(ram, store):
    store.fails = True
    with pytest.raises(UsageError, match="lease record"):
        async with serving(ram, store=store):
            pass


async def test_a_record_of_a_server_with_vmm_needs_one(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store):
        pass
    with pytest.raises(UsageError, match="with --qmp"):
        async with serving(ram, store=store):
            pass


async def test_a_resume_that_fails_can_be_asked_again(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        await suspend(client)
        vmm.resume_fails = True
        assert (await refused(resume(client)))[0] is grpc.StatusCode.INTERNAL
        assert await client.fetch((0, 0, 1)) == ["NOT_FROZEN"]  # it may run
        vmm.resume_fails = False
        await resume(client)
        assert vmm.is_running


async def test_a_vm_resumed_past_the_server_is_noticed(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client)
        vmm.start_past_the_server()
        assert (await refused(hand_over(client, last.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert server.keeper.book.phase is Phase.RUNNING
        last = await suspend(client)
        await hand_over(client, last.generation)
        vmm.start_past_the_server()
        await eventually(lambda: server.keeper.memory.generation != last.generation)
        assert server.keeper.book.phase is Phase.HANDED_OVER
        assert vmm.starts == 0


async def test_a_hand_over_asks_the_vmm_only_if_it_has_not_just_answered(ram, vmm, store, clock, monkeypatch):
    monkeypatch.setattr("farfault_server.server.WATCH_INTERVAL_S", 3600.0)
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client)
        await eventually(lambda: server.keeper.book.phase is Phase.FROZEN)
        await eventually(lambda: not server.owner._lock.locked())
        questions = vmm.questions
        vmm.is_running = True  # and the VMM does not tell
        clock.now_s += 2 * STILL_S_MAX
        assert (await refused(hand_over(client, last.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert vmm.questions > questions
        last = await suspend(client)
        await eventually(lambda: not server.owner._lock.locked())
        questions = vmm.questions
        await hand_over(client, last.generation)
        assert vmm.questions == questions, "it had just said that the VM stands still"


async def test_a_vm_that_ran_for_a_moment_past_the_server_is_noticed(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client)
        await hand_over(client, last.generation)
        vmm.started_unix_us = vmm.stopped_unix_us + 1  # and it stands still again
        vmm.started.set()
        await eventually(lambda: server.keeper.memory.generation != last.generation)
        generation = server.keeper.memory.generation
        vmm.started.set()
        await eventually(lambda: not vmm.started.is_set())
        assert server.keeper.memory.generation == generation, "the same start was counted twice"


# ---- a destination that is not heard of ----------------------------------------------------------


class FakeClock:
    """Stands still until it is told to go."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    """The clock by which a server that starts now measures silence."""
    clock = FakeClock()
    monkeypatch.setattr("farfault_server.server.VmOwner", lambda vmm, keeper: VmOwner(vmm, keeper, clock))
    return clock


async def test_a_vm_runs_again_when_nothing_is_heard_of_its_destination(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client, resume_after_ms=1)
        await eventually(lambda: vmm.is_running and server.keeper.book.phase is Phase.RUNNING)
        assert (await refused(hand_over(client, last.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert await client.fetch((0, 0, 1)) == ["NOT_FROZEN"]
        await resume(client)  # as a destination does that is refused
        assert vmm.starts == 1
        assert [phase for phase in store.phases if phase is not Phase.RUNNING] == [
            Phase.SUSPENDING,
            Phase.FROZEN,
            Phase.RESUMING,
        ]
        last = await suspend(client)
        await hand_over(client, last.generation)


async def test_signs_of_life_keep_a_vm_stopped(ram, vmm, store, clock):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client, resume_after_ms=5000)
        for _ in range(10):
            clock.now_s += 4.9
            await server.owner.take_back()
            assert server.keeper.book.phase is Phase.FROZEN
            await hold(client, 5000)
        await hand_over(client, last.generation)
    assert vmm.starts == 0


async def test_the_moment_in_which_a_vm_is_taken_back(ram, vmm, store, clock):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        await suspend(client, resume_after_ms=5000)
        clock.now_s += 4.75
        assert server.owner.held_for_s == 0.25
        await server.owner.take_back()
        assert not vmm.is_running
        clock.now_s += 0.25
        await server.owner.take_back()
        assert vmm.is_running
        assert server.owner.held_for_s == math.inf


@pytest.mark.parametrize("is_complete", [False, True])
async def test_a_vm_that_was_handed_over_is_never_taken_back(ram, vmm, store, clock, is_complete):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client, resume_after_ms=1000)
        await hand_over(client, last.generation)
        if is_complete:
            complete = pb.CompleteRequest(generation=last.generation)
            await client.pages.Complete(complete, metadata=client.metadata, timeout=TIMEOUT_S)
        clock.now_s += 1e9
        assert server.owner.held_for_s == math.inf
        await server.owner.take_back()
        assert (await refused(hold(client, 1)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        await server.owner.take_back()
        assert server.keeper.book.phase is (Phase.COMPLETED if is_complete else Phase.HANDED_OVER)
    assert vmm.starts == 0
    assert not vmm.is_running


@pytest.mark.parametrize("is_first", ["hand over", "take back"])
async def test_a_hand_over_and_a_taking_back_exclude_each_other(ram, vmm, store, clock, is_first):
    """Both at the same moment, each while the other one's record is being written."""
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client, resume_after_ms=1000)
        owner = server.owner
        await eventually(lambda: not owner._lock.locked())  # Suspend has ended
        store.may_save.clear()
        clock.now_s += 1
        lease = server.keeper.authorize(opened.lease_id, opened.token)
        calls = {"hand over": owner.hand_over(lease, last.generation), "take back": owner.take_back()}
        first = asyncio.ensure_future(calls.pop(is_first))
        await eventually(owner._lock.locked)
        second = asyncio.ensure_future(*calls.values())
        await asyncio.sleep(0)
        store.may_save.set()
        await asyncio.wait({first, second})
        handed_over = (first if is_first == "hand over" else second).exception()
        assert vmm.is_running == (is_first == "take back")
        assert server.keeper.book.phase is (Phase.RUNNING if vmm.is_running else Phase.HANDED_OVER)
        assert isinstance(handed_over, RefusedError) == vmm.is_running
        assert not {Phase.HANDED_OVER, Phase.RESUMING} <= set(store.phases)


async def test_a_hand_over_whose_client_leaves_counts_all_the_same(ram, vmm, store, clock):
    """It is cancelled while its record is being written, and so leaves the lock before the record is there."""
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client, resume_after_ms=1000)
        owner = server.owner
        await eventually(lambda: not owner._lock.locked())  # Suspend has ended
        store.may_save.clear()
        clock.now_s += 1
        lease = server.keeper.authorize(opened.lease_id, opened.token)
        handing_over = asyncio.ensure_future(owner.hand_over(lease, last.generation))
        await eventually(owner._lock.locked)
        await eventually(server.keeper._lock.locked)
        handing_over.cancel()
        await asyncio.wait({handing_over})
        taking_back = asyncio.ensure_future(owner.take_back())
        await eventually(owner._lock.locked)
        assert server.keeper.book.phase is Phase.FROZEN
        store.may_save.set()
        await asyncio.wait({taking_back})
        assert server.keeper.book.phase is Phase.HANDED_OVER
        assert isinstance(taking_back.exception(), RefusedError)
        await owner.take_back()
        await hand_over(client, last.generation)
    assert vmm.starts == 0
    assert Phase.RESUMING not in store.phases


async def test_a_client_that_names_no_time_is_waited_for(ram, vmm, store, clock):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        await suspend(client)
        clock.now_s += 1e9
        await server.owner.take_back()
        assert server.keeper.book.phase is Phase.FROZEN
        await hold(client, 1000)
        clock.now_s += 1
        await hold(client)
        clock.now_s += 1e9
        await server.owner.take_back()
        assert server.keeper.book.phase is Phase.FROZEN


async def test_a_vm_that_cannot_be_taken_back_is_tried_again(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        vmm.resume_fails = True
        await suspend(client, resume_after_ms=1)
        await eventually(lambda: server.keeper.book.phase is Phase.RESUMING)
        assert (await refused(hold(client, 1000)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        vmm.resume_fails = False
        await eventually(lambda: vmm.is_running and server.keeper.book.phase is Phase.RUNNING)


async def test_device_state_that_nobody_reads_is_broken_off(ram):
    """As on a link on which packets vanish: the connection is there, and the write waits."""
    vmm = FakeVmm([bytes(256 << 10)] * 200)  # more than flow control lets through unread
    async with serving(ram, vmm=vmm) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        request = pb.SuspendRequest(resume_after_ms=300)
        call = client.source.Suspend(request, metadata=client.metadata, timeout=TIMEOUT_S)
        await eventually(lambda: server.keeper.book.phase is Phase.SUSPENDING)
        await eventually(lambda: vmm.is_running and server.keeper.book.phase is Phase.RUNNING)
        code, message = await refused(read_all(call))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "nothing was heard of the destination" in message
        vmm.chunks = STATE
        last = await suspend(client, resume_after_ms=60_000)
        await hand_over(client, last.generation)


async def test_a_slow_reader_that_is_heard_of_gets_all_of_the_device_state(ram, clock):
    vmm = FakeVmm([bytes(256 << 10)] * 20)
    async with serving(ram, vmm=vmm) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        request = pb.SuspendRequest(resume_after_ms=1000)
        call = client.source.Suspend(request, metadata=client.metadata, timeout=TIMEOUT_S)
        await call.read()
        for _ in range(20):
            clock.now_s += 0.9
            await hold(client, 1000)
            chunk = await call.read()
        assert chunk.last
        await hand_over(client, chunk.generation)


async def read_all(call) -> None:
    async for _ in call:
        pass


async def test_only_a_migration_lease_holds_a_vm(ram, vmm, store, clock):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        code, message = await refused(hold(client, 1000))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "it is running" in message
        await suspend(client, resume_after_ms=1000)
        async with connected(server.port) as other:
            assert (await refused(hold(other, 9000)))[0] is grpc.StatusCode.UNAUTHENTICATED
            await other.open(pb.LEASE_KIND_CLONE)
            assert (await refused(hold(other, 9000)))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert server.owner.held_for_s == 1


async def test_a_restarted_server_waits_until_it_is_told_how_long(ram, vmm, store, clock):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client, resume_after_ms=1000)
    clock.now_s += 1e9
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await server.owner.take_back()
        assert server.keeper.book.phase is Phase.FROZEN
        await client.resume(opened, last.generation)
        await hold(client, 1000)
        clock.now_s += 1
        await server.owner.take_back()
        assert vmm.is_running


@pytest.mark.parametrize("phase", [Phase.FROZEN, Phase.RESUMING])
async def test_a_server_that_is_killed_while_it_takes_a_vm_back(ram, vmm, store, clock, phase):
    """Before its record the destination may still get the VM; after it, never."""
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client, resume_after_ms=1000)
        clock.now_s += 1
        await server.owner.take_back()
    del store.books[store.phases.index(phase) + 1 :]
    vmm.is_running = False
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.resume(opened)
        if phase is Phase.FROZEN:
            await hand_over(client, last.generation)
        else:
            assert (await refused(hand_over(client, last.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
        assert vmm.is_running == (phase is Phase.RESUMING)


async def test_express_follows_the_state_of_the_vm(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        express = await Express.connect(client.lane(pb.LANE_KIND_EXPRESS))
        await express.hello(opened.lease_id, opened.token)
        express.send(request(1, (0, 0, 1)))
        assert (await express.batch()).extents[0].kind == pb.EXTENT_KIND_NOT_FROZEN
        last = await suspend(client)
        express.send(request(2, (0, 0, 1)))
        batch = await express.batch()
        assert (batch.data, batch.generation) == (page(0), last.generation)
        express.close()


async def test_describe(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        response = await client.source.DescribeVm(pb.DescribeVmRequest(), metadata=client.metadata, timeout=TIMEOUT_S)
        assert VmDescription.from_proto(response.description) == DESCRIPTION


async def test_without_a_vmm(ram):
    async with serving(ram) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        for call in (suspend(client), resume(client), hand_over(client, 1)):
            code, message = await refused(call)
            assert code is grpc.StatusCode.UNIMPLEMENTED
            assert "--qmp" in message


# ---- restart -------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.FROZEN, Phase.HANDED_OVER, Phase.COMPLETED])
async def test_a_restart_leaves_a_stopped_vm_alone(ram, vmm, store, phase):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client)
        if phase is not Phase.FROZEN:
            await hand_over(client, last.generation)
        if phase is Phase.COMPLETED:
            complete = pb.CompleteRequest(generation=last.generation)
            await client.pages.Complete(complete, metadata=client.metadata, timeout=TIMEOUT_S)
    abandon = phase is not Phase.FROZEN  # too late: the destination owns it
    async with (
        serving(ram, vmm=vmm, store=store, abandon=abandon) as server,
        connected(server.port) as client,
    ):
        resumed = await client.resume(opened, last.generation)
        assert resumed.generation == last.generation
        assert await client.fetch((0, 0, 1)) == [page(0)]
    assert vmm.starts == 0


async def test_another_vm_after_one_that_moved_away_begins_a_record_of_its_own(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client)
        await hand_over(client, last.generation)
        complete = pb.CompleteRequest(generation=last.generation)
        await client.pages.Complete(complete, metadata=client.metadata, timeout=TIMEOUT_S)
    contents = ram.read_bytes()
    other = ram.with_name("other")  # made while the first one is there: its inode is another one
    other.write_bytes(contents)
    other.rename(ram)
    vmm.is_running = True
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        assert opened.vm_state == pb.VM_STATE_RUNNING
        assert opened.generation != last.generation


@pytest.mark.parametrize("phase", [Phase.SUSPENDING, Phase.RESUMING])
async def test_a_restart_in_the_middle_lets_the_vm_run(ram, vmm, store, phase):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        await client.open(pb.LEASE_KIND_MIGRATION)
        await suspend(client)
        await resume(client)
    index = store.phases.index(phase)
    del store.books[index + 1 :]
    vmm.is_running = False
    async with serving(ram, vmm=vmm, store=store) as server:
        assert vmm.is_running
        assert server.keeper.book.phase is Phase.RUNNING
        stopped = {
            book.generation for book in store.books[: index + 1] if book.phase in (Phase.SUSPENDING, Phase.FROZEN)
        }
        assert server.keeper.book.generation not in stopped


async def test_abandon_takes_a_suspended_vm_back(ram, vmm, store):
    async with serving(ram, vmm=vmm, store=store) as server, connected(server.port) as client:
        opened = await client.open(pb.LEASE_KIND_MIGRATION)
        last = await suspend(client)
    async with serving(ram, vmm=vmm, store=store, abandon=True) as server, connected(server.port) as client:
        assert vmm.is_running
        assert (await refused(client.resume(opened, last.generation)))[0] is grpc.StatusCode.FAILED_PRECONDITION
