"""A check gives everything back, and a move that was interrupted before the hand-over is rolled back by `--resume`."""

from __future__ import annotations

import asyncio
import subprocess

import pytest
from conftest import MakeScene
from farfault_client.demo.processes import farfault_argv
from farfault_client.demo.scene import Scene, SceneConfig
from farfault_client.demo.vms import VmmKind
from farfault_client.receive.journal import Journal, Record, Step
from farfault_client.session.connect import session_config
from farfault_client.session.lease import LeaseKey
from farfault_client.session.session import Session

pytestmark = pytest.mark.e2e

CONFIG = SceneConfig(VmmKind.SIMULATED, ram_bytes=32 << 20, vcpus=1, pages_max=64)


def migrate(scene: Scene, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`farfault migrate` against the scene's page server, to its end."""
    where = ["--source", f"127.0.0.1:{scene.port}", "--attach", str(scene.attach), "--qmp", str(scene.destination.qmp)]
    command = farfault_argv("migrate", *where, "--state", str(scene.folder / "receiver"), *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def assert_source_goes_on(scene: Scene) -> None:
    before = scene.counter(scene.source)
    scene.processes.wait_until(lambda: scene.counter(scene.source) > before, "the source goes on", 20, "source")


def test_check_ends_its_receiver_and_gives_the_lease_back(make_scene: MakeScene) -> None:
    scene = make_scene(CONFIG)
    scene.start_source()
    scene.start_server()
    scene.start_destination()

    first, second = migrate(scene, "--check"), migrate(scene, "--check")

    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert "ok   VMM attached" in second.stdout
    assert_source_goes_on(scene)


def test_a_move_whose_source_runs_again_is_rolled_back(make_scene: MakeScene) -> None:
    scene = make_scene(CONFIG)
    scene.start_source()
    scene.start_server()
    target = f"127.0.0.1:{scene.port}"
    key = asyncio.run(_open_lease(target))
    generation_before_it_ran = key.generation + 1
    record = Record(Step.SUSPENDING, target, key.lease_id, key.token, generation_before_it_ran)
    Journal(scene.folder / "receiver").write(record)

    result = migrate(scene, "--resume")

    assert result.returncode == 4, result.stderr
    assert "the source VM runs as before" in result.stderr
    assert Journal(scene.folder / "receiver").record is None
    assert_source_goes_on(scene)


async def _open_lease(target: str) -> LeaseKey:
    session = Session(session_config(target))
    await session.open()
    key = session.key
    await session.close()
    return key
