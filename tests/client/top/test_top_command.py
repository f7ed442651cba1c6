"""`farfault top` against a receiver's real control service."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import UnreachableError
from farfault_client.receive.control import ControlService, serve_control
from farfault_client.top.command import looks, top
from receiver_stub import make_receiver


async def test_one_look_has_rates_and_ends(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.progress.phase = rpb.PHASE_POSTCOPY
    end = await serve_control(tmp_path / "control", ControlService(receiver, lambda: None))
    try:
        async with asyncio.timeout(20):
            seen = [figures async for figures in looks(tmp_path / "control", 0.05, once=True)]
    finally:
        await end()

    assert len(seen) == 1
    fields = json.loads(json.dumps(seen[0].to_json()))
    assert fields["phase"] == "postcopy"
    assert fields["guest_pages"] == 1024


async def test_looks_end_with_the_move(tmp_path: Path) -> None:
    receiver = make_receiver(tmp_path)
    receiver.progress.phase = rpb.PHASE_DONE
    end = await serve_control(tmp_path / "control", ControlService(receiver, lambda: None))
    try:
        async with asyncio.timeout(20):
            seen = [figures async for figures in looks(tmp_path / "control", 0.05)]
    finally:
        await end()

    assert [figures.status.phase for figures in seen] == [rpb.PHASE_DONE]


def test_a_missing_socket_has_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="no control socket"):
        top.main(["--control", str(tmp_path / "none")], standalone_mode=False)
