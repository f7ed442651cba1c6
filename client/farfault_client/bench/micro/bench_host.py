"""Where micro-benchmarks run: RAM file, compiled programs, page server and receiver, on two processors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from farfault_cli.errors import FarfaultError

from farfault_client.bench.micro.ram_file import make_ram_file
from farfault_client.bench.programs import compiled
from farfault_client.demo.processes import Processes, farfault_argv

START_TIMEOUT_S: Final = 60.0
CASE_TIMEOUT_S: Final = 180.0
RAM_PAGES: Final = 65536
RAM_FOLDER: Final = Path("/dev/shm")


PROCESSORS: Final = 2
"""All processes share so many: as in whole moves, and so that a ratio on a larger machine means the same."""


class BenchHost:
    """Owns files and processes, and keeps this process and all of them on `PROCESSORS`. A context manager.

    Attributes:
        programs: folder with the compiled C programs.
        ram: the RAM file.
    """

    def __init__(self) -> None:
        self._usable = os.sched_getaffinity(0)
        self.programs = compiled()
        self._folder = Path(tempfile.mkdtemp(prefix="farfault-micro-"))
        self.ram = RAM_FOLDER / f"{self._folder.name}-{os.getpid()}.ram"
        self._number = 0

    def __enter__(self) -> Self:
        os.sched_setaffinity(0, sorted(self._usable)[:PROCESSORS])
        make_ram_file(self.ram, RAM_PAGES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.sched_setaffinity(0, self._usable)
        self.ram.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def c(self, program: str, *arguments: object) -> dict[str, float]:
        """Runs a C program."""
        return _object([str(self.programs / program), *map(str, arguments)])

    def worker(self, module: str, *arguments: object) -> dict[str, float]:
        """Runs a worker of this package."""
        module = f"farfault_client.bench.micro.{module}"
        return _object([sys.executable, "-m", module, *map(str, arguments)])

    @contextmanager
    def page_server(self) -> Iterator[tuple[str, Processes]]:
        """A page server; yields its target."""
        self._number += 1
        folder = self._folder / f"server-{self._number}"
        folder.mkdir()
        port_file = folder / "port"
        command = farfault_argv("serve", "--ram", str(self.ram), "--listen", "127.0.0.1:0")
        with Processes(folder) as processes:
            processes.start("serve", [*command, "--port-file", str(port_file)])
            processes.wait_until(port_file.exists, "the page server listens", START_TIMEOUT_S, "serve")
            yield f"127.0.0.1:{port_file.read_text().strip()}", processes

    @contextmanager
    def receiver(self, *flags: str) -> Iterator[Path]:
        """A page server and a receiver that streams nothing by itself; yields the attach socket."""
        with self.page_server() as (target, processes):
            folder = processes.folder
            attach = folder / "attach"
            # A cap of one byte a second: only what is missed is fetched.
            command = farfault_argv("receive", "--source", target, "--attach", str(attach), "--bandwidth", "1")
            command += ["--state", str(folder / "state"), *flags]
            processes.start("receive", command)
            processes.wait_until(attach.exists, "the receiver listens", START_TIMEOUT_S, "receive")
            yield attach

    def faults(self, pager: str, threads: int, faults: int, attach: Path | None, socket: str) -> dict[str, float]:
        """Runs the fault worker; see its `Options`."""
        options: dict[str, Any] = {
            "pager": pager,
            "programs": str(self.programs),
            "ram": str(self.ram),
            "attach": str(attach or ""),
            "pages": RAM_PAGES,
            "each": faults // threads,
            "threads": threads,
            "socket": socket,
        }
        return self.worker("fault_worker", json.dumps(options))


def _object(command: Sequence[str]) -> dict[str, float]:
    """Runs a program that prints one JSON object."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise FarfaultError(f"no result within {CASE_TIMEOUT_S:g} s: {' '.join(command)}") from None
    if done.returncode:
        raise FarfaultError(f"exit code {done.returncode}: {' '.join(command)}\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
