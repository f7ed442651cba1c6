"""What a user is told when a VMM can not be had, and when it goes away."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_qmp import Drop, FakeVmm, Hang, Refuse, fake_vmm
from farfault_cli.errors import UnreachableError
from farfault_vmm import connection
from farfault_vmm.connection import CommandError, QmpConnection
from farfault_vmm.qmp import QmpVmm

SHORT_S = 0.1
LONG_S = 10.0


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeVmm]:
    async with fake_vmm(tmp_path / "qmp") as vmm:
        yield vmm


async def refused(path: Path, timeout_s: float = LONG_S) -> UnreachableError:
    with pytest.raises(UnreachableError) as caught:
        await QmpVmm.connect(path, timeout_s)
    return caught.value


async def test_no_socket(tmp_path: Path) -> None:
    error = await refused(tmp_path / "qmp")
    assert "there is no QMP socket" in error.problem
    assert f"-qmp unix:{tmp_path}/qmp,server=on,wait=off" in error.remedy


async def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "qmp"))
    error = await refused(tmp_path / "qmp")
    assert "nobody listens" in error.problem
    assert "start it again" in error.remedy


async def test_path_that_no_socket_can_have(tmp_path: Path) -> None:
    error = await refused(tmp_path / ("x" * 200))
    assert "cannot connect" in error.problem


async def test_another_client_is_served(fake: FakeVmm) -> None:
    async with await QmpVmm.connect(fake.path):
        error = await refused(fake.path, SHORT_S)
        assert "one QMP client at a time" in error.problem
        assert "second -qmp socket" in error.remedy


async def test_so_many_clients_wait_that_no_other_may(tmp_path: Path) -> None:
    waiting = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        try:
            for _ in range(2):
                client = socket.socket(socket.AF_UNIX)
                waiting.append(client)
                client.setblocking(False)
                try:
                    client.connect(str(tmp_path / "qmp"))
                except BlockingIOError:
                    break
            assert "one QMP client at a time" in (await refused(tmp_path / "qmp")).problem
        finally:
            for client in waiting:
                client.close()


@pytest.mark.parametrize(
    "greeting", [b'{"hello": "there"}\r\n', b"220 mail.example.org ESMTP\r\n", b'{"QMP": {"version": 7}}\r\n']
)
async def test_not_qmp(fake: FakeVmm, greeting: bytes) -> None:
    fake.greeting = greeting
    error = await refused(fake.path)
    assert "does not speak QMP" in error.problem
    assert "-qmp unix:" in error.remedy


async def test_negotiation_is_refused(fake: FakeVmm) -> None:
    fake.replies["qmp_capabilities"] = Refuse("no")
    assert "does not speak QMP" in (await refused(fake.path)).problem


async def test_hangs_up_instead_of_negotiating(fake: FakeVmm) -> None:
    fake.replies["qmp_capabilities"] = Drop()
    assert "does not speak QMP" in (await refused(fake.path)).problem


async def test_next_client_is_served_after_close(fake: FakeVmm) -> None:
    for _ in range(3):
        vmm = await QmpVmm.connect(fake.path)
        assert await vmm.status() == "running"
        await vmm.close()
        await vmm.close()
        with pytest.raises(UnreachableError):
            await vmm.status()


async def test_command_error_has_the_words_of_the_vmm(fake: FakeVmm) -> None:
    fake.replies["stop"] = Refuse("out of order")
    async with await QmpVmm.connect(fake.path) as vmm:
        with pytest.raises(CommandError, match="refused 'stop': out of order"):
            await vmm.stop()
        assert await vmm.status() == "running"


async def test_no_answer(fake: FakeVmm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "COMMAND_TIMEOUT_S", SHORT_S)
    fake.replies["stop"] = Hang()
    async with await QmpVmm.connect(fake.path) as vmm:
        with pytest.raises(UnreachableError, match=r"did not answer 'stop' in 0\.1 s"):
            await vmm.stop()


async def test_loss_ends_what_waits(fake: FakeVmm) -> None:
    fake.replies["stop"] = Drop()
    async with await QmpVmm.connect(fake.path) as vmm:
        closed = asyncio.create_task(vmm.wait_closed())
        with pytest.raises(UnreachableError, match="closed its QMP connection"):
            await vmm.stop()
        await asyncio.wait_for(closed, LONG_S)
        with pytest.raises(UnreachableError, match="closed its QMP connection"):
            await vmm.status()


async def test_events_before_the_loss_are_kept_then_the_loss_is_told(fake: FakeVmm) -> None:
    conn = await QmpConnection.connect(fake.path, LONG_S)
    with conn.events("STOP") as events:
        fake.event("STOP")
        fake.event("POWERDOWN")
        fake.drop()
        await asyncio.wait_for(conn.wait_lost(), LONG_S)
        event = await conn.next_event(events, LONG_S, "a stop")
        assert event.name == "STOP"
        assert event.unix_us > 0
        with pytest.raises(UnreachableError, match="closed its QMP connection"):
            await conn.next_event(events, LONG_S, "a stop")
    with pytest.raises(UnreachableError):
        await conn.pass_descriptor(0, "any")
    await conn.close()


async def test_event_that_does_not_come(fake: FakeVmm) -> None:
    conn = await QmpConnection.connect(fake.path, LONG_S)
    with conn.events("STOP") as events, pytest.raises(UnreachableError, match=r"a stop did not happen in 0\.1 s"):
        await conn.next_event(events, SHORT_S, "a stop")
    await conn.close()


async def test_quit(fake: FakeVmm) -> None:
    async with await QmpVmm.connect(fake.path) as vmm:
        await vmm.quit()
        assert fake.commands[-1] == "quit"
