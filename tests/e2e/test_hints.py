"""The working set of one move, recorded, makes the next one of the same guest miss less."""

from __future__ import annotations

import pytest
from conftest import MakeScene
from farfault_client.demo.processes import farfault_argv
from farfault_client.demo.scene import SceneConfig
from farfault_client.demo.vms import VmmKind
from farfault_client.receive.working_set import read_hints
from farfault_shim.guest import GuestKind

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SLOW = ("--bandwidth", "20MiB")


def test_a_recorded_working_set_is_fetched_first(make_scene: MakeScene) -> None:
    config = SceneConfig(
        VmmKind.QEMU, ram_bytes=64 * MIB, vcpus=1, guest=GuestKind.SEQUENTIAL, pages_max=2000, receive_flags=SLOW
    )
    scene = make_scene(config)
    scene.start_all()
    hints = scene.folder / "hints"
    scene.processes.start("record", farfault_argv("record", "--control", str(scene.control), "-o", str(hints)))
    first = scene.move()
    assert scene.processes.wait("record", 30) == 0, scene.processes.tail("record")
    recorded = read_hints(hints, first.guest_pages)
    assert sum(run.count for run in recorded) > 0

    again = make_scene(SceneConfig(**{**vars_of(config), "receive_flags": (*SLOW, "--hints", str(hints))}))
    again.start_all()
    second = again.move()
    assert second.guest_pages == second.installed_pages + second.zero_pages
    again.wait_for_progress(again.counter(again.source))
    assert again.processes.wait("receive", 30) == 0
    _, check = again.check_guest(again.destination)
    assert check.ok, check.problems


def vars_of(config: SceneConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in SceneConfig.__slots__}
