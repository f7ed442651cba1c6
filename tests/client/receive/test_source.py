"""A source VM hears of its destination, so that it stays stopped for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import xxhash
from farfault.v1 import pages_pb2 as pb
from farfault.v1 import pages_pb2_grpc
from farfault_cli.errors import FarfaultError
from farfault_client.receive import source as source_module
from farfault_client.receive.source import HOLD_INTERVAL_S, RESUME_AFTER_S, SourceVm
from farfault_client.session.connect import session_config
from farfault_client.session.lease import Lease
from farfault_client.session.session import Session
from farfault_shim.layout import Layout

TIMEOUT_S = 20.0


class FakeSource(pages_pb2_grpc.SourceServiceServicer):
    """Counts signs of life; with `is_slow` it answers none of them, with `is_old` it does not know them.

    Attributes:
        peers: who has asked for the VM, each time.
        answers_from: how often it does not answer that.
    """

    def __init__(self) -> None:
        self.times_ms: list[int] = []
        self.heard = asyncio.Event()
        self.is_slow = self.is_old = False
        self.peers: list[str] = []
        self.answers_from = 0
        self.refusal: grpc.StatusCode | None = None

    def _hear(self, resume_after_ms: int) -> None:
        self.times_ms.append(resume_after_ms)
        self.heard.set()
        self.heard = asyncio.Event()

    async def wait(self, count: int) -> None:
        """Until so many have been heard."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.times_ms) < count:
                await self.heard.wait()

    async def Suspend(self, request: Any, context: Any) -> AsyncIterator[pb.DeviceStateChunk]:
        self._hear(request.resume_after_ms)
        yield pb.DeviceStateChunk(data=b"state", generation=9)
        yield pb.DeviceStateChunk(last=True, checksum=xxhash.xxh3_64_intdigest(b"state"), generation=9)

    async def HandOver(self, request: Any, context: Any) -> pb.HandOverResponse:
        self.peers.append(context.peer())
        if len(self.peers) <= self.answers_from:
            await asyncio.Event().wait()
        return pb.HandOverResponse()

    async def Hold(self, request: Any, context: Any) -> pb.HoldResponse:
        self._hear(request.resume_after_ms)
        if self.is_old:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if self.refusal is not None:
            await context.abort(self.refusal, "the source VM does not wait for this destination: it is running")
        if self.is_slow:
            await asyncio.Event().wait()
        return pb.HoldResponse()


@pytest.fixture
async def fake() -> FakeSource:
    return FakeSource()


@pytest.fixture
async def source(fake: FakeSource) -> AsyncIterator[SourceVm]:
    server = grpc.aio.server()
    pages_pb2_grpc.add_SourceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    session = Session(session_config(f"127.0.0.1:{port}"))
    session.lease = Lease("lease", "secret", 1, Layout([(4096, 4096)]))
    yield SourceVm(session)
    await session.close()
    await server.stop(0)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "HOLD_INTERVAL_S", 0.01)


def test_several_signs_of_life_may_be_lost() -> None:
    assert RESUME_AFTER_S >= 3 * HOLD_INTERVAL_S


async def test_suspend_says_how_long_the_source_shall_wait(source: SourceVm, fake: FakeSource) -> None:
    generations: list[int] = []
    assert [chunk async for chunk in source.suspend(generations.append)] == [b"state"]
    assert generations == [9]
    assert fake.times_ms == [RESUME_AFTER_S * 1000]


@pytest.mark.usefixtures("often")
async def test_the_source_hears_of_us_again_and_again(source: SourceVm, fake: FakeSource) -> None:
    async with source.held():
        await fake.wait(5)
    assert set(fake.times_ms) == {RESUME_AFTER_S * 1000}


@pytest.mark.usefixtures("often")
async def test_no_sign_of_life_waits_for_the_answer_to_another(source: SourceVm, fake: FakeSource) -> None:
    fake.is_slow = True
    async with source.held():
        await fake.wait(5)


async def test_a_source_that_waits_already_hears_of_us_at_once(
    source: SourceVm, fake: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "HOLD_INTERVAL_S", 3600.0)
    async with source.held():
        async with source.held(at_once=True):
            await fake.wait(1)
        assert len(fake.times_ms) == 1


@pytest.mark.usefixtures("often")
async def test_it_ends_with_what_it_was_for(source: SourceVm, fake: FakeSource) -> None:
    with pytest.raises(ZeroDivisionError):
        async with source.held():
            await fake.wait(1)
            raise ZeroDivisionError
    assert not [task for task in asyncio.all_tasks() if "hold" in repr(task.get_coro())]


async def for_ever() -> None:
    await asyncio.Event().wait()


@pytest.mark.usefixtures("often")
async def test_work_for_a_vm_that_was_taken_back_is_broken_off(source: SourceVm, fake: FakeSource) -> None:
    ended: list[str] = []

    async def load() -> None:
        try:
            async for _ in source.suspend(lambda generation: None):
                await fake.wait(5)
            fake.refusal = grpc.StatusCode.FAILED_PRECONDITION
            await for_ever()
        finally:
            ended.append("load")

    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(FarfaultError, match="does not wait for this destination: it is running"):
            await source.while_held(load())
    assert ended == ["load"]


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED])
async def test_silence_breaks_nothing_off(source: SourceVm, fake: FakeSource, code: grpc.StatusCode) -> None:
    async def load() -> None:
        async for _ in source.suspend(lambda generation: None):
            fake.refusal = code
            await fake.wait(5)

    await source.while_held(load())


@pytest.mark.usefixtures("often")
async def test_a_vm_that_does_not_stand_still_yet_was_not_taken_back(source: SourceVm, fake: FakeSource) -> None:
    fake.refusal = grpc.StatusCode.FAILED_PRECONDITION
    await source.while_held(fake.wait(5))


async def test_work_that_fails_or_is_cancelled_ends_as_it_does(source: SourceVm) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await source.while_held(fail())
    working = asyncio.ensure_future(source.while_held(for_ever()))
    await asyncio.sleep(0)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


async def test_a_hand_over_that_is_not_answered_is_asked_for_over_another_connection(
    source: SourceVm, fake: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "HAND_OVER_TIMEOUT_S", 0.05)
    await source.hand_over(9)
    fake.answers_from = 3
    await source.hand_over(9)
    first, again, *others = fake.peers
    assert again == first, "the connection that is there is tried first"
    assert len({first, *others}) == len(fake.peers) - 1 == 3


@pytest.mark.usefixtures("often")
async def test_a_server_that_knows_no_signs_of_life_does_no_harm(source: SourceVm, fake: FakeSource) -> None:
    fake.is_old = True
    async with source.held(at_once=True):
        await fake.wait(3)
