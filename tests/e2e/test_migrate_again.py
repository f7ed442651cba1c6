"""`farfault migrate` may be interrupted: the move goes on, and the same command finds it again."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import MakeScene
from farfault.v1 import receiver_pb2 as rpb
from farfault_client.demo.processes import farfault_argv
from farfault_client.demo.scene import Scene, SceneConfig
from farfault_client.demo.vms import VmmKind
from farfault_client.migrate.follow import ReceiverClient

pytestmark = pytest.mark.e2e

MIB = 1 << 20
TIMEOUT_S = 60


def migrate_argv(scene: Scene, *more: str) -> list[str]:
    return farfault_argv(
        "migrate",
        *("--source", f"127.0.0.1:{scene.port}", "--attach", str(scene.attach), "--qmp", str(scene.destination.qmp)),
        *("--state", str(scene.folder / "receiver"), "--json", *more),
    )


async def wait_for_post_copy(control: Path) -> None:
    async with asyncio.timeout(TIMEOUT_S), ReceiverClient(control) as receiver:
        async for status in receiver.watch():
            if status.phase == rpb.PHASE_POSTCOPY:
                return


def test_an_interrupted_migrate_is_joined_by_the_next(make_scene: MakeScene) -> None:
    scene = make_scene(SceneConfig(VmmKind.QEMU, ram_bytes=64 * MIB, vcpus=1))
    scene.start_source()
    scene.start_server()
    scene.start_destination()
    with (scene.folder / "first.log").open("w") as log:
        first = subprocess.Popen(migrate_argv(scene, "--bandwidth", "4MiB"), stdout=log, stderr=log)
    control = scene.folder / "receiver" / "control"
    scene.processes.wait_until(control.exists, "the receiver listens", TIMEOUT_S)
    asyncio.run(wait_for_post_copy(control))
    first.send_signal(signal.SIGINT)
    assert first.wait(TIMEOUT_S) == 130

    again = subprocess.run(migrate_argv(scene, "--bandwidth", "0"), capture_output=True, text=True, timeout=TIMEOUT_S)

    assert again.returncode == 0, again.stderr
    figures = json.loads(again.stdout)
    assert figures["phase"] == "done"
    assert figures["installed_pages"] + figures["zero_pages"] == figures["guest_pages"]
    scene.wait_for_progress(scene.counter(scene.source))
    late = subprocess.run(migrate_argv(scene, "--abort"), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert late.returncode == 2
    assert "no receiver works on a move" in late.stderr
