"""One measurement: a VM whose memory is elsewhere starts, and its vCPUs run through their pages."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from farfault_cli.errors import FarfaultError
from farfault_shim.guest import GuestKind, total_touched
from farfault_vmm.qmp import QmpVmm

from farfault_client.demo.processes import Processes, farfault_argv
from farfault_client.demo.scene import Scene, SceneConfig
from farfault_client.demo.vms import VmmKind

START_TIMEOUT_S: Final = 60.0
LOAD_TIMEOUT_S: Final = 60.0
WINDOW_S: Final = 1.0
"""How long the vCPUs run, unless they have been through all pages before."""
POLL_S: Final = 0.002
RAM_BYTES: Final = 256 << 20


class FaultSource(Enum):
    """How the vCPUs miss pages."""

    NOWAIT = "stock-nowait"
    BLOCKING = "blocking"


class Way(Enum):
    """How pages come."""

    LOCAL = "local"
    """From a file, by a pager of this host without any network."""
    GRPC = "grpc"
    """From a page server, over gRPC."""
    EXPRESS = "express"
    """From a page server, over the express lane."""


class Rate(NamedTuple):
    """Result of one measurement.

    Attributes:
        pages_per_s: that the guest visited for the first time.
        errors: pages that held something else than the guest had left there.
    """

    pages_per_s: float
    errors: int


def measure(vcpus: int, source: FaultSource, way: Way) -> Rate:
    """Starts a VM on absent memory and counts.

    Raises:
        FarfaultError: with the last words of everybody.
    """
    folder = Path(tempfile.mkdtemp(prefix="farfault-vcpus-"))
    config = SceneConfig(
        VmmKind.QEMU, ram_bytes=RAM_BYTES, vcpus=vcpus, guest=GuestKind.RANDOM, fault_source=source.value
    )
    with Processes(folder) as processes:
        scene = Scene(config, folder, processes)
        try:
            scene.start_source()
            rate = asyncio.run(_measure(scene, way))
        except FarfaultError as error:
            where = f"{vcpus} vCPUs, {source.value}, {way.value}"
            raise type(error)(f"{where}: {error.problem}\n{scene.logs()}") from error
        finally:
            scene.remove_ram()
    shutil.rmtree(folder, ignore_errors=True)
    return rate


async def _measure(scene: Scene, way: Way) -> Rate:
    async with asyncio.timeout(START_TIMEOUT_S + LOAD_TIMEOUT_S), await QmpVmm.connect(scene.source.qmp) as source:
        state = [chunk async for chunk in source.suspend()]
        await asyncio.to_thread(_start_pager, scene, way)
        await asyncio.to_thread(scene.start_destination)
        async with await QmpVmm.connect(scene.destination.qmp) as destination:
            await destination.prepare_destination()
            await destination.load(_each(state))
            await destination.cont()
            return await _count(scene)


async def _each(chunks: list[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def _start_pager(scene: Scene, way: Way) -> None:
    """Whoever serves the destination; the source stands still already."""
    processes, attach = scene.processes, scene.attach
    if way is Way.LOCAL:
        module = "farfault_client.bench.vcpus.local_pager"
        processes.start("receive", [sys.executable, "-m", module, str(attach), str(scene.source.ram)])
    else:
        port_file = scene.folder / "port"
        command = farfault_argv("serve", "--ram", str(scene.source.ram), "--listen", "127.0.0.1:0")
        processes.start("serve", [*command, "--port-file", str(port_file)])
        processes.wait_until(port_file.exists, "the page server listens", START_TIMEOUT_S, "serve")
        # A cap of one byte a second: only what is missed is fetched.
        command = farfault_argv("receive", "--source", f"127.0.0.1:{port_file.read_text().strip()}")
        command += ["--attach", str(attach), "--state", str(scene.folder / "receiver"), "--bandwidth", "1"]
        processes.start("receive", [*command, *(["--no-express"] if way is Way.GRPC else [])])
    processes.wait_until(attach.exists, "the receiver listens", START_TIMEOUT_S, "receive")


async def _count(scene: Scene) -> Rate:
    vm = scene.destination
    before = total_touched(scene.source.mailboxes())
    began_at = now = time.monotonic()
    touched = 0
    while touched < vm.parameters.data_pages and now - began_at < WINDOW_S:
        await asyncio.sleep(POLL_S)
        touched, now = max(0, total_touched(vm.mailboxes()) - before), time.monotonic()
    first_visits = min(touched, vm.parameters.data_pages)
    return Rate(first_visits / (now - began_at), sum(mailbox.errors for mailbox in vm.mailboxes()))
