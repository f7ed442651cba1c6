"""One move of one mode, played and measured."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Final

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError

from farfault_client.bench.compare import usage
from farfault_client.bench.compare.guest_figures import GuestSample, guest_figures
from farfault_client.bench.compare.guest_watch import GuestWatch, sample, ticks_per_us
from farfault_client.bench.compare.monitor import Monitor, MonitoredVm
from farfault_client.bench.compare.native import start_native_move
from farfault_client.bench.compare.network import Network, free_ports, network
from farfault_client.bench.compare.scenario import Mode, Scenario
from farfault_client.demo.processes import Processes
from farfault_client.demo.scene import PORTS, Scene, SceneConfig, port_flags, scene_folder
from farfault_client.demo.vms import VmmKind
from farfault_client.migrate.follow import ReceiverClient, verdict_of

START_TIMEOUT_S: Final = 60.0
STEP_TIMEOUT_S: Final = 30.0
MOVE_TIMEOUT_S: Final = 300.0
FIRST_SECOND_US: Final = 1_000_000
INSECURE: Final = ("--insecure",)
"""Both pagers move memory as it is; the namespaces of a link are the benchmark's own."""
RAM_FOLDER: Final = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one move. None where a mode has no such thing.

    Attributes:
        mode, scenario: what was played.
        faults: slow accesses of the guest between switchover and last page.
        mean_fault_us, p50_fault_us, p99_fault_us: of them, as the guest saw them.
        blocked_share: of the vCPUs' time in that phase.
        touched_first_second: pages that the guest visited in the first second after the switchover.
        postcopy_s: from the switchover until the last page was there.
        downtime_ms: from STOP on the source to RESUME on the destination.
        cpu_s_per_gib: CPU time of both VMMs and all helper processes over the whole move, guest excluded.
        serve_own_bytes, receive_own_bytes: resident memory of each side's helpers, without the guest's RAM.
        serve_rss_bytes, receive_rss_bytes: the same with everything that is mapped.
        verification_errors: wrong words or pages, as the guest and a check from outside say.
        others_cpu_share: of the machine's CPU time in the phase, what other processes took.
    """

    mode: Mode
    scenario: Scenario
    faults: int
    mean_fault_us: float | None
    p50_fault_us: float | None
    p99_fault_us: float | None
    blocked_share: float
    touched_first_second: float
    postcopy_s: float
    downtime_ms: float
    cpu_s_per_gib: float
    serve_own_bytes: int | None
    receive_own_bytes: int | None
    serve_rss_bytes: int | None
    receive_rss_bytes: int | None
    verification_errors: int
    others_cpu_share: float

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        fields = asdict(self)
        scenario = fields.pop("scenario")
        fields["mode"] = self.mode.value
        return {**fields, **scenario, "guest": self.scenario.guest.value, "link": self.scenario.link.value}


@dataclass(slots=True)
class Phase:
    """What happened when, and at what price; Unix times in microseconds."""

    stopped_us: int = 0
    resumed_us: int = 0
    all_there_us: int = 0
    cpu_s: float = 0.0
    others_cpu_share: float = 0.0
    serve: usage.Memory | None = None
    receive: usage.Memory | None = None


def play(scenario: Scenario, mode: Mode) -> Run:
    """Moves a new VM and checks it.

    Raises:
        FarfaultError: it could not be moved; with the last words of everybody.
    """
    folder = scene_folder("farfault-bench-")
    ports = free_ports(PORTS)
    with network(scenario, mode, ports) as between, Processes(folder) as processes:
        scene = _scene(scenario, mode, folder, processes, ports, between)
        try:
            _start(scene, mode)
            phase, samples = asyncio.run(_move(scene, mode, between, ports[0]))
            run = _figures(scene, scenario, mode, phase, samples)
        except FarfaultError as error:
            raise type(error)(f"{mode.value}, {scenario.title}: {error.problem}\n{scene.logs()}") from error
        finally:
            scene.remove_ram()
    shutil.rmtree(folder, ignore_errors=True)
    return run


def _scene(
    scenario: Scenario, mode: Mode, folder: Path, processes: Processes, ports: Sequence[int], between: Network
) -> Scene:
    config = SceneConfig(
        VmmKind.QEMU,
        ram_bytes=scenario.ram_bytes,
        vcpus=scenario.vcpus,
        guest=scenario.guest,
        fault_source=mode.fault_source,
        serve_flags=(*port_flags(ports), *INSECURE),
        receive_flags=INSECURE,
        source_target=f"{between.connect_to}:{ports[0]}",
        source_prefix=between.source_prefix,
        destination_prefix=between.destination_prefix,
        listen=between.source,
    )
    scene = Scene(config, folder, processes, RAM_FOLDER)
    scene.port = ports[0]
    scene.source, scene.destination = (
        MonitoredVm(vm.kind, vm.name, vm.folder, vm.ram, vm.ram_bytes, vm.vcpus, vm.guest, pages_max=vm.pages_max)
        for vm in (scene.source, scene.destination)
    )
    return scene


def _start(scene: Scene, mode: Mode) -> None:
    """Everybody, up to the point where the VM can move; its guest has gone through its memory once."""
    scene.start_source()
    if not mode.is_native:
        scene.start_server()
        scene.start_destination()
        scene.start_receiver()
        return
    scene.processes.start("destination", [*scene.config.destination_prefix, *scene.destination.argv(incoming=True)])
    monitor = _monitor_of(scene, "destination")
    scene.processes.wait_until(monitor.exists, "the destination VMM listens", START_TIMEOUT_S, "destination")


def _monitor_of(scene: Scene, name: str) -> Path:
    vm = getattr(scene, name)
    assert isinstance(vm, MonitoredVm)
    return vm.monitor


async def _move(scene: Scene, mode: Mode, between: Network, port: int) -> tuple[Phase, list[GuestSample]]:
    async with (
        asyncio.timeout(MOVE_TIMEOUT_S),
        Monitor(_monitor_of(scene, "source")) as source,
        Monitor(_monitor_of(scene, "destination")) as destination,
        _watching(scene) as watch,
    ):
        phase, account = Phase(), _Account(scene, is_native=mode.is_native)
        if mode.is_native:
            preempt = mode is Mode.QEMU_PREEMPT
            addresses = {"listen_on": between.destination, "connect_to": between.connect_to}
            await start_native_move(source, destination, preempt=preempt, port=port, **addresses)
            await _note_switchover(phase, source, destination)
            completed = await destination.event("MIGRATION", "completed", timeout_s=MOVE_TIMEOUT_S)
            phase.all_there_us = completed.unix_us
        else:
            last = asyncio.create_task(_move_with_receiver(scene.control), name="move")
            await _note_switchover(phase, source, destination)
            phase.all_there_us = phase.resumed_us + round((await last).postcopy_s * 1e6)
        account.close(phase)
        await watch.run_until(max(phase.all_there_us, phase.resumed_us + FIRST_SECOND_US))
    return phase, watch.samples


async def _note_switchover(phase: Phase, source: Monitor, destination: Monitor) -> None:
    phase.stopped_us = (await source.event("STOP", timeout_s=STEP_TIMEOUT_S)).unix_us
    phase.resumed_us = (await destination.event("RESUME", timeout_s=STEP_TIMEOUT_S)).unix_us


async def _move_with_receiver(control: Path) -> rpb.MigrationStatus:
    last = rpb.MigrationStatus()
    async with ReceiverClient(control) as receiver:
        async for status in receiver.migrate():
            last = status
    verdict_of(last)
    return last


@asynccontextmanager
async def _watching(scene: Scene) -> AsyncIterator[GuestWatch]:
    watch = GuestWatch(scene.destination.ram, scene.destination.vcpus)
    task = asyncio.create_task(watch.run(), name="watch guest")
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


class _Account:
    """CPU time from now on.

    Args:
        scene: whose processes.
        is_native: QEMU has no helpers.
    """

    def __init__(self, scene: Scene, *, is_native: bool) -> None:
        self._vmms = [scene.processes.pid(name) for name in ("source", "destination")]
        self._helpers = {} if is_native else {name: scene.processes.pid(name) for name in ("serve", "receive")}
        self._cpu_s, self._busy_s, self._guest_s, self._began = self._read()

    def _read(self) -> tuple[float, float, float, float]:
        cpu_s = usage.cpu_s([*self._vmms, *self._helpers.values()])
        return cpu_s, usage.busy_cpu_s(), usage.guest_s(self._vmms), monotonic()

    def close(self, phase: Phase) -> None:
        """Writes the account of the time since the beginning."""
        cpu_s, busy_s, guest_s, now = self._read()
        phase.cpu_s = cpu_s - self._cpu_s
        others_s = (busy_s - self._busy_s) - phase.cpu_s - (guest_s - self._guest_s)
        phase.others_cpu_share = max(0.0, others_s / ((now - self._began) * (os.cpu_count() or 1)))
        if self._helpers:
            phase.serve = usage.memory([self._helpers["serve"]])
            phase.receive = usage.memory([self._helpers["receive"]])


def _figures(scene: Scene, scenario: Scenario, mode: Mode, phase: Phase, samples: list[GuestSample]) -> Run:
    stopped = sample(scene.source.ram, scenario.vcpus)
    rate = ticks_per_us(scene.source.ram)
    guest = guest_figures(
        stopped,
        samples,
        vcpus=scenario.vcpus,
        ticks_per_us=rate,
        resumed_us=phase.resumed_us,
        all_there_us=phase.all_there_us,
    )
    scene.wait_for_progress(scene.counter(scene.source))
    mailboxes, check = scene.check_guest(scene.destination)
    return Run(
        mode,
        scenario,
        **asdict(guest),
        postcopy_s=(phase.all_there_us - phase.resumed_us) / 1e6,
        downtime_ms=(phase.resumed_us - phase.stopped_us) / 1e3,
        cpu_s_per_gib=phase.cpu_s / (scenario.ram_bytes / (1 << 30)),
        serve_own_bytes=phase.serve.own if phase.serve else None,
        receive_own_bytes=phase.receive.own if phase.receive else None,
        serve_rss_bytes=phase.serve.rss if phase.serve else None,
        receive_rss_bytes=phase.receive.rss if phase.receive else None,
        verification_errors=sum(mailbox.errors for mailbox in mailboxes) + check.wrong,
        others_cpu_share=phase.others_cpu_share,
    )
