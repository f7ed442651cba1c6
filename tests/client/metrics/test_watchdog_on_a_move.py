"""The page server is killed in the middle of a move: log, metrics and `top` say who waits, until it is back."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from farfault.v1 import receiver_pb2 as rpb
from farfault_client.demo.processes import Processes, farfault_argv
from farfault_client.demo.scene import Scene, SceneConfig
from farfault_client.demo.vms import VmmKind
from farfault_client.migrate.follow import ReceiverClient
from prometheus_client.parser import text_string_to_metric_families

LIMIT_S = 0.2


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ff-watchdog-"))  # short, for unix sockets
    yield path
    shutil.rmtree(path, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Metrics:
    """What a receiver exposes now; empty where it does not answer."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def value(self, name: str) -> float:
        try:
            with urllib.request.urlopen(self._url, timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return -1.0
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return next((sample.value for sample in samples if sample.name == name), -1.0)


def look(control: Path) -> dict[str, Any]:
    command = farfault_argv("top", "--control", str(control), "--once", "--json", "--interval", "0.05")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    fields: dict[str, Any] = json.loads(done.stdout)
    return fields


async def lift_the_cap(control: Path) -> None:
    async with ReceiverClient(control) as receiver:
        await receiver.tune(0)


def test_an_outage_is_seen_everywhere_and_ends_well(folder: Path) -> None:
    port = free_port()
    flags = ("--metrics", f"127.0.0.1:{port}", "--slow-fault", str(LIMIT_S), "--bandwidth", "8MiB")
    config = SceneConfig(VmmKind.SIMULATED, 24 << 20, vcpus=1, fault_source="simulated", receive_flags=flags)
    metrics = Metrics(port)
    with ThreadPoolExecutor(1) as pool, Processes(folder) as processes:
        scene = Scene(config, folder, processes)
        try:
            scene.start_all()
            moved = pool.submit(scene.move)
            processes.wait_until(lambda: metrics.value("farfault_progress_ratio") > 0.05, "pages flow", 30, "receive")
            processes.kill("serve")
            away = lambda: metrics.value("farfault_connected") == 0  # noqa: E731 - named for the message
            processes.wait_until(away, "the receiver sees the loss", 30, "receive")
            waits = lambda: metrics.value("farfault_longest_wait_seconds") > 2 * LIMIT_S  # noqa: E731
            processes.wait_until(waits, "a guest waits", 30, "receive")
            assert metrics.value("farfault_slow_faults_total") >= 1
            seen = look(scene.control)
            asyncio.run(lift_the_cap(scene.control))
            scene.start_server()
            status = moved.result(timeout=120)
            log = processes.log("receive").read_text()
        finally:
            scene.remove_ram()

    assert seen["connected"] is False
    assert seen["longest_wait_s"] > LIMIT_S
    assert seen["counters"]["slow_faults"] >= 1
    assert status.phase == rpb.PHASE_DONE
    begun = re.findall(r"fault (\S+): vCPU 0 waits ", log)
    over = re.findall(r"fault (\S+): vCPU 0 waited .*; it goes on", log)
    assert begun, "reported while it lasted"
    assert set(begun) <= set(over), "and when it was over"
    assert len(begun) == len(set(begun)), "each once"
