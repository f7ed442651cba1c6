"""A VM moves while hostile clients do what they can to its page server: nothing is lost, and the server goes on."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from conftest import MakeScene
from farfault.v1 import pages_pb2 as pb
from farfault_client.demo.scene import SceneConfig
from farfault_client.demo.vms import VmmKind
from hostile_clients import ATTACKS, DEMAND, OPEN, PREFACE, SETTINGS, attack, call, connect, frame
from test_move import check_figures, unhurried

pytestmark = pytest.mark.e2e

MIB = 1 << 20
STAYS_S = 0.2
SILENT = 50
"""Connections that say nothing, all the time."""


class HostileClients:
    """They go on, in a thread of their own, from `start` until the context ends."""

    def __init__(self) -> None:
        self.attacks = 0
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()

    def start(self, port: int) -> None:
        """Two of them, one after another of all attacks, and some that are silent."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(port)), name="hostile clients")
        self._thread.start()

    async def _run(self, port: int) -> None:
        silent = [await connect(port) for _ in range(SILENT)]
        await asyncio.gather(self._attack(port, 0), self._attack(port, 1))
        for _, writer in silent:
            writer.transport.abort()

    async def _attack(self, port: int, seed: int) -> None:
        rng = random.Random(seed)
        kinds = itertools.cycle([kind(rng) for kind in ATTACKS] + [strangers()])
        while not self._is_over.is_set():
            await attack(port, next(kinds), reads=bool(rng.randrange(2)), stays_s=STAYS_S)
            self.attacks += 1


def strangers() -> bytes:
    """Opens without the admission token, and streams on a lease that is not theirs."""
    message = pb.OpenRequest(protocol_version=1, kind=pb.LEASE_KIND_MIGRATION).SerializeToString()
    metadata = [("farfault-lease", "0" * 16), ("authorization", "Bearer wrong")]
    opens = b"".join(call(stream, OPEN, (), message) for stream in range(1, 200, 4))
    streams = b"".join(call(stream, DEMAND, metadata, b"") for stream in range(201, 400, 2))
    return PREFACE + frame(SETTINGS, 0, 0) + opens + streams


@pytest.mark.parametrize(
    "config",
    [
        SceneConfig(VmmKind.SIMULATED, ram_bytes=24 * MIB, vcpus=2, fault_source="simulated"),
        SceneConfig(VmmKind.REFERENCE, ram_bytes=64 * MIB, vcpus=2),
    ],
    ids=lambda config: config.kind.value,
)
def test_a_move_beside_hostile_clients(config: SceneConfig, make_scene: MakeScene, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    flags = ("--admission-token-file", str(token))
    scene = make_scene(unhurried(replace(config, serve_flags=flags, receive_flags=flags)))
    scene.start_source()
    scene.start_server()
    with HostileClients() as hostile:
        hostile.start(scene.port)
        scene.start_destination()
        scene.start_receiver()
        scene.processes.wait_until(lambda: hostile.attacks > len(ATTACKS), "all attacks were tried", 60)
        before = hostile.attacks
        check_figures(scene.move(), scene)
        scene.wait_for_progress(scene.counter(scene.source))
        assert scene.processes.wait("receive", 30) == 0
        assert hostile.attacks > before, "nobody was hostile during the move"
        assert Path(f"/proc/{scene.processes.pid('serve')}/exe").exists(), "the server lives"
    mailboxes, check = scene.check_guest(scene.destination)
    assert check.ok, check.problems
    assert [mailbox.errors for mailbox in mailboxes] == [0] * config.vcpus
    log = scene.processes.log("serve").read_text()
    assert "complete: " in log
    assert "Traceback" not in log
