"""The soak: one guest moves there and back, again and again; nothing may grow and nothing may be left behind.

::

    make soak                                   15 minutes, half on QEMU and half on the reference VMM
    .venv/bin/python tests/chaos/soak.py --minutes 2 --vmm reference

After each move the parts are looked at: descriptors, threads and memory of the VMM that took the guest over and of the
page server, processes that outlived their owner, sockets and RAM files that nobody removed. At the end the last
quarter of the moves is compared with the first.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS / "chaos"), str(TESTS / "helpers")]
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # before gRPC is loaded: children are forked while it runs

import click  # noqa: E402
from chaos_plan import kinds  # noqa: E402
from chaos_run import RUN_MARK, processes_of  # noqa: E402
from farfault_client.demo.processes import Processes  # noqa: E402
from farfault_client.demo.scene import Scene, SceneConfig  # noqa: E402
from farfault_client.demo.vms import VmmKind  # noqa: E402
from faulty_move import continue_vm  # noqa: E402

MIB = 1 << 20
CHECK_EVERY = 10
"""Moves between two checks of all RAM from outside, for which the VM stands still."""
MOVES_MIN = 8
GROWTH_RATIO_MAX = 1.05
SLACK = {"descriptors": 0.0, "threads": 1.0, "rss_mib": 2.0}
"""What a figure may grow by beside `GROWTH_RATIO_MAX`: a thread that is just ending, a page cache of the C library."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen after one move; ``vmm`` took the guest over, ``serve`` had sent it."""

    move: int
    downtime_ms: float
    postcopy_s: float
    vmm_descriptors: float
    vmm_threads: float
    vmm_rss_mib: float
    serve_descriptors: float
    serve_threads: float
    serve_rss_mib: float


FIGURES = tuple(name for name in Sample.__dataclass_fields__ if name.startswith(("vmm_", "serve_")))


class Soak:
    """One guest and its moves.

    Args:
        kind: of all VMMs.
        folder: for everything.
    """

    def __init__(self, kind: VmmKind, folder: Path) -> None:
        source = "simulated" if kind is VmmKind.SIMULATED else "stock-nowait"
        ram_bytes = (24 if kind is VmmKind.SIMULATED else 48) * MIB
        self.config = SceneConfig(kind, ram_bytes=ram_bytes, vcpus=2, fault_source=source)
        self.folder = folder
        self.samples: list[Sample] = []
        self._scene = self._new_scene(0)
        self._owner = self._scene.processes

    def run(self, deadline: float) -> None:
        """Moves until the deadline, at least `MOVES_MIN` times.

        Raises:
            AssertionError: something was lost or left behind.
        """
        try:
            self._scene.start_source()
            while time.monotonic() < deadline or len(self.samples) < MOVES_MIN:
                self.samples.append(self._move(len(self.samples)))
        finally:
            self._scene.processes.__exit__(None, None, None)
            self._owner.__exit__(None, None, None)
            self._scene.remove_ram()

    def _new_scene(self, number: int) -> Scene:
        folder = self.folder / f"{number}"
        folder.mkdir()
        return Scene(self.config, folder, Processes(folder))

    def _move(self, number: int) -> Sample:
        scene = self._scene
        scene.start_server()
        scene.start_destination()
        scene.start_receiver()
        status = scene.move()
        scene.wait_for_progress(scene.counter(scene.source))
        scene.summary_of_receiver()
        processes = scene.processes
        vmm, serve = processes.pid("destination"), processes.pid("serve")
        sample = Sample(number, status.downtime_ms, status.postcopy_s, *usage(vmm), *usage(serve))
        processes.end("receive")
        processes.end("serve")
        self._owner.end("destination" if number else "source")  # where the guest came from
        scene.source.ram.unlink()
        self._check(scene, number)
        self._go_on_from(scene, number + 1)
        return sample

    def _check(self, scene: Scene, number: int) -> None:
        """Nothing is left but the VMM, and its guest is well."""
        vmm = scene.processes.pid("destination")
        left = [command for pid, command in processes_of(self.folder) if pid != vmm]
        assert not left, f"processes left behind: {left}"
        for path in (scene.attach, scene.control):
            assert not path.exists(), f"{path.name} left behind"
        tag = f"farfault-{os.getpid()}-"
        files = [path for path in scene.ram_folder.glob(f"{tag}*") if path != scene.destination.ram]
        assert not files, f"RAM files left behind: {files}"
        for mailbox in scene.destination.mailboxes():
            assert mailbox.errors == 0
            assert mailbox.boots == 1, "the guest was reset"
        if number % CHECK_EVERY == CHECK_EVERY - 1:
            _, check = scene.check_guest(scene.destination)
            assert check.ok, check.problems
            continue_vm(scene.destination.qmp)

    def _go_on_from(self, scene: Scene, number: int) -> None:
        """The destination of one move is the source of the next."""
        if number > 1:
            shutil.rmtree(self.folder / f"{number - 2}")
        following = self._new_scene(number)
        following.source = scene.destination
        following.destination = replace(
            following.destination,
            name=f"vm{number}",
            ram=following.ram_folder / f"farfault-{os.getpid()}-soak-{number}.ram",
        )
        self._scene, self._owner = following, scene.processes


def usage(pid: int) -> tuple[int, int, float]:
    """Descriptors, threads and private resident memory in MiB of a process; the guest's RAM is shared memory."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    private_kib = int(fields["RssAnon"].split()[0])
    return len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]), private_kib / 1024  # noqa: PTH208


def growth(samples: Sequence[Sample]) -> list[str]:
    """Figures whose median in the last quarter is above that of the first; empty: nothing has grown."""
    quarter = max(2, len(samples) // 4)
    grown = []
    for name in FIGURES:
        first, last = (
            statistics.median(getattr(sample, name) for sample in part)
            for part in (samples[1 : quarter + 1], samples[-quarter:])
        )
        slack = SLACK[name.split("_", 1)[1]]
        if last > first * GROWTH_RATIO_MAX + slack:
            grown.append(f"{name}: {first:.1f} at first, {last:.1f} at last")
    return grown


def play(kind: VmmKind, minutes: float) -> list[Sample]:
    """All moves of one kind of VMM."""
    folder = Path(tempfile.mkdtemp(prefix="ff-soak-"))
    os.environ[RUN_MARK] = str(folder)
    soak = Soak(kind, folder)
    try:
        soak.run(time.monotonic() + minutes * 60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return soak.samples


@click.command()
@click.option("--minutes", type=float, default=15.0, show_default=True, help="In all.")
@click.option("--vmm", type=click.Choice([kind.value for kind in VmmKind]), help="Default: each that there is.")
@click.option("--json", "as_json", is_flag=True, help="Print every sample as one JSON object, nothing else.")
def main(minutes: float, vmm: str | None, as_json: bool) -> None:
    """Moves a guest there and back for a while, and tells whether anything grows."""
    chosen = [VmmKind(vmm)] if vmm else kinds()
    failed = False
    for kind in chosen:
        samples = play(kind, minutes / len(chosen))
        grown = growth(samples)
        failed = failed or bool(grown)
        if as_json:
            rows = [asdict(sample) for sample in samples]
            click.echo(json.dumps({"vmm": kind.value, "moves": len(samples), "grown": grown, "samples": rows}))
            continue
        downtime = statistics.median(sample.downtime_ms for sample in samples)
        click.echo(f"{kind.title}: {len(samples)} moves, median downtime {downtime:.1f} ms")
        for name in FIGURES:
            values = [getattr(sample, name) for sample in samples]
            click.echo(f"  {name:<18} first {values[1]:8.1f}  last {values[-1]:8.1f}  largest {max(values):8.1f}")
        for line in grown:
            click.echo(f"  GROWN {line}", err=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
