"""Plays a fleet: many scenes on this machine, started a few at a time, and moved at once.

A guest never rests. So each stands still from its first round until all scenes are there: processes that start beside
dozens of busy vCPUs would take minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Final, TypeVar

from farfault.v1 import receiver_pb2 as rpb
from farfault_cli.errors import FarfaultError

from farfault_client.bench.fleet.arrivals import Arrivals
from farfault_client.bench.fleet.figures import FleetFigures, VmFigures, longest_pause_s
from farfault_client.demo.processes import Processes
from farfault_client.demo.scene import Scene, SceneConfig, scene_folder
from farfault_client.migrate.follow import ReceiverClient, verdict_of

AT_ONCE: Final = 4
"""Scenes that are started, checked or ended at the same time."""
RUN_TIMEOUT_S: Final = 120.0
"""Until every guest has gone on."""
READY_TIMEOUT_S: Final = 120.0
"""Until a receiver's preflight passes."""
READY_POLL_S: Final = 0.5
MOVE_TIMEOUT_S: Final = 900.0
"""Of a VM beside all others."""
FAILURES_TOLD_MAX: Final = 5

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Moved:
    """How a VM moved.

    Attributes:
        status: the receiver's last.
        runs_at: when it ran on the destination; monotonic.
    """

    status: rpb.MigrationStatus
    runs_at: float


def play(config: SceneConfig, vms: int, say: Say) -> FleetFigures:
    """Starts VMs, moves them all at once, and checks them.

    Args:
        config: of each VM.
        say: told what happens.

    Raises:
        FarfaultError: one could not be moved; with the last words of everybody around it.
    """
    folder = scene_folder("farfault-fleet-")
    try:
        figures = _play(config, vms, folder, say)
    except FarfaultError as error:
        raise type(error)(error.problem, error.remedy or f"logs are in {folder}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return figures


def _play(config: SceneConfig, vms: int, folder: Path, say: Say) -> FleetFigures:
    # The threads that start processes live as long as these: Linux ends a child with the thread that started it.
    with ThreadPoolExecutor(AT_ONCE) as pool, _scenes(config, vms, folder, pool) as scenes:
        _each(pool, _start, scenes, lambda done: say(f"started {done}/{vms}"))
        say("all receivers wait; the guests go on")
        before = [scene.counter(scene.source) for scene in scenes]
        for scene in scenes:
            _signal_source(scene, signal.SIGCONT)
        for scene, counter in zip(scenes, before, strict=True):
            went_on = lambda scene=scene, counter=counter: scene.counter(scene.source) > counter  # noqa: E731
            scene.processes.wait_until(went_on, "the guest goes on", RUN_TIMEOUT_S, "source")
        began_at, moved, arrivals = asyncio.run(_move_all(scenes, say))
        errors = _each(pool, _errors, scenes, lambda done: say(f"checked {done}/{vms}"))
        figures = [
            _figures(number, began_at, moved[number], arrivals.moments[number], errors[number]) for number in range(vms)
        ]
    return FleetFigures(figures, arrivals.looked_every_s)


@contextmanager
def _scenes(config: SceneConfig, vms: int, folder: Path, pool: ThreadPoolExecutor) -> Iterator[list[Scene]]:
    scenes = []
    for number in range(vms):
        place = folder / str(number)
        place.mkdir()
        scenes.append(Scene(config, place, Processes(place)))
    try:
        yield scenes
    finally:
        _each(pool, _end, scenes)


def _each(
    pool: ThreadPoolExecutor,
    step: Callable[[Scene], T],
    scenes: Sequence[Scene],
    tell: Callable[[int], None] = lambda done: None,
) -> list[T]:
    """A step for every scene, some at the same time. None of them goes on when this returns or raises.

    Args:
        tell: given the number of those that are done, after each.
    """
    futures = [pool.submit(step, scene) for scene in scenes]
    try:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            tell(done)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    return [future.result() for future in futures]


def _start(scene: Scene) -> None:
    """Everybody, up to the point where the VM can move; its guest stands still."""
    with _explaining(scene):
        scene.start_all()
        _signal_source(scene, signal.SIGSTOP)


def _signal_source(scene: Scene, number: signal.Signals) -> None:
    """By a signal, as the page server has the VMM's QMP socket."""
    if "source" in scene.processes.names() and scene.processes.is_running("source"):
        os.kill(scene.processes.pid("source"), number)


def _errors(scene: Scene) -> int:
    """Lets the guest look at all of its pages, then looks itself."""
    with _explaining(scene):
        scene.wait_for_progress(scene.counter(scene.source))
        mailboxes, check = scene.check_guest(scene.destination)
        return sum(mailbox.errors for mailbox in mailboxes) + check.wrong


def _end(scene: Scene) -> None:
    with scene.processes:
        _signal_source(scene, signal.SIGCONT)  # or it would not hear that it shall end
        scene.remove_ram()


@contextmanager
def _explaining(scene: Scene) -> Iterator[None]:
    """Adds which VM it was, and the last words of everybody around it."""
    try:
        yield
    except FarfaultError as error:
        raise type(error)(f"VM {scene.folder.name}: {error.problem}\n{scene.logs()}", error.remedy) from error


async def _move_all(scenes: Sequence[Scene], say: Say) -> tuple[float, list[Moved], Arrivals]:
    """Returns when all were told to move, how each did, and when its pages came."""
    async with AsyncExitStack() as stack:
        receivers = [await stack.enter_async_context(ReceiverClient(scene.control)) for scene in scenes]
        few = asyncio.Semaphore(AT_ONCE)
        await asyncio.gather(*(_ready(scene, receiver, few) for scene, receiver in zip(scenes, receivers, strict=True)))
        say(f"all {len(scenes)} VMs move")
        arrivals = stack.enter_context(Arrivals([scene.destination.ram for scene in scenes]))
        began_at = monotonic()
        moves = [
            asyncio.create_task(_move(scene, receiver, partial(arrivals.note, number)), name=f"move {number}")
            for number, (scene, receiver) in enumerate(zip(scenes, receivers, strict=True))
        ]
        for done, move in enumerate(asyncio.as_completed(moves), start=1):
            with contextlib.suppress(FarfaultError):  # told below; the others shall end first
                await move
            say(f"ended {done}/{len(moves)}")
    failed = [error for move in moves if isinstance(error := move.exception(), FarfaultError)]
    if failed:
        told = "\n".join(error.problem for error in failed[:FAILURES_TOLD_MAX])
        raise FarfaultError(f"{len(failed)} of {len(moves)} moves failed:\n{told}")
    return began_at, [move.result() for move in moves], arrivals


async def _ready(scene: Scene, receiver: ReceiverClient, few: asyncio.Semaphore) -> None:
    """Waits until a receiver would move its VM; this also connects to it."""
    deadline = monotonic() + READY_TIMEOUT_S
    async with few:
        with _explaining(scene):
            while failed := [check for check in await receiver.preflight() if not check.passed]:
                if monotonic() > deadline:
                    raise FarfaultError(f"not ready within {READY_TIMEOUT_S:g} s: {failed[0].detail}")
                await asyncio.sleep(READY_POLL_S)


async def _move(scene: Scene, receiver: ReceiverClient, progressed: Callable[[], None]) -> Moved:
    with _explaining(scene):
        status, runs_at, settled = rpb.MigrationStatus(), float("inf"), 0
        try:
            async with asyncio.timeout(MOVE_TIMEOUT_S):
                async for status in receiver.migrate():
                    if status.counters["settled_pages"] != settled:
                        settled = status.counters["settled_pages"]
                        progressed()
                    if status.postcopy_s:  # told late at worst, so the earliest is the best
                        runs_at = min(runs_at, monotonic() - status.postcopy_s)
        except TimeoutError:
            raise FarfaultError(f"the move takes longer than {MOVE_TIMEOUT_S:g} s") from None
        verdict_of(status)
        return Moved(status, runs_at)


def _figures(vm: int, began_at: float, moved: Moved, arrivals: Sequence[float], errors: int) -> VmFigures:
    status, latency = moved.status, moved.status.fault_latency
    return VmFigures(
        vm,
        pages=status.guest_pages,
        switchover_s=moved.runs_at - began_at,
        downtime_ms=status.downtime_ms,
        postcopy_s=status.postcopy_s,
        demand_faults=status.demand_faults,
        mean_fault_us=latency.mean_us if latency.count else None,
        p99_fault_us=latency.p99_us if latency.count else None,
        longest_pause_s=longest_pause_s(arrivals, moved.runs_at, moved.runs_at + status.postcopy_s),
        verification_errors=errors,
    )
