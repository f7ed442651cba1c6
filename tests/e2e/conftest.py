"""The scene of an end-to-end test: real processes, real VMs, everything ended and removed afterwards."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from farfault_client.demo.processes import Processes
from farfault_client.demo.scene import Scene, SceneConfig
from farfault_client.demo.vms import QEMU, VmmKind
from farfault_shim.annotate.discover import discover

MakeScene = Callable[[SceneConfig], Scene]


@pytest.fixture
def make_scene() -> Iterator[MakeScene]:
    """Makes scenes; skips, with its reason, what this machine cannot play."""
    scenes: list[tuple[Scene, Processes]] = []

    def make(config: SceneConfig) -> Scene:
        reason = why_not(config)
        if reason:
            pytest.skip(reason)
        folder = Path(tempfile.mkdtemp(prefix="ff-e2e-"))
        processes = Processes(folder)
        scene = Scene(config, folder, processes)
        scenes.append((scene, processes))
        return scene

    yield make
    for scene, processes in scenes:
        processes.__exit__(None, None, None)
        scene.remove_ram()
        shutil.rmtree(scene.folder, ignore_errors=True)


def why_not(config: SceneConfig) -> str:
    """Why a scene cannot be played here; empty: it can."""
    if config.kind is VmmKind.SIMULATED:
        return ""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "no /dev/kvm that this user may use"
    if config.kind is VmmKind.QEMU and not shutil.which(QEMU):
        return f"{QEMU} is not installed"
    if config.fault_source == "stock-nowait" and all(found.annotator is None for found in discover().values()):
        return "NOWAIT exits cannot be annotated: " + next(iter(discover().values())).problem
    return ""
