"""The memory worker on the host: built once, run again to say what the guest must have printed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from farfault_cli.errors import FarfaultError

from farfault_client.demo.linux.serial_log import Tick, parse_serial

COMPILER = "gcc"
FLAGS = ("-std=c11", "-D_POSIX_C_SOURCE=200809L", "-Wall", "-Wextra", "-Werror", "-static", "-O2")
COMPILE_TIMEOUT_S = 60.0
RERUN_TIMEOUT_S = 120.0
"""Of the oracle; 2000 ticks take 0.2 s."""


def build_worker(cache: Path) -> Path:
    """The worker's program, a static x86-64 ELF file in the cache; compiled when source or flags are new.

    Raises:
        FarfaultError: no compiler, or it refuses the source.
    """
    source = (files("farfault_client.demo.linux") / "worker.c").read_bytes()
    digest = hashlib.sha256(source + " ".join((COMPILER, *FLAGS)).encode()).hexdigest()[:16]
    program = cache / "linux-guest" / f"worker-{digest}"
    if program.exists():
        return program
    remedy = "as root: apt-get install gcc libc6-dev"
    if shutil.which(COMPILER) is None:
        raise FarfaultError(f"{COMPILER} is needed for the guest's worker and is not installed", remedy)
    program.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=program.parent) as scratch:
        built, text = Path(scratch, "worker"), Path(scratch, "worker.c")
        text.write_bytes(source)
        argv = [COMPILER, *FLAGS, "-o", str(built), str(text)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if done.returncode:
            raise FarfaultError(f"{COMPILER} cannot build the guest's worker: {done.stderr.strip()}", remedy)
        built.replace(program)
    return program


def expected_tick(program: Path, number: int, *, worker_mib: int) -> Tick:
    """What a guest that lost nothing prints at a tick: the worker runs to it here, without pauses.

    Args:
        program: from `build_worker`.
        number: the tick, from 1.
        worker_mib: the guest's parameter.

    Raises:
        FarfaultError: the program does not run here.
    """
    if number < 1:
        raise ValueError(f"tick {number}: the first is 1")
    argv = [str(program), str(worker_mib), str(number), str(number), "0"]
    done = subprocess.run(argv, capture_output=True, timeout=RERUN_TIMEOUT_S, check=False)
    log = parse_serial(done.stdout)
    if done.returncode or len(log.ticks) != 1:
        raise FarfaultError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.decode()}")
    return log.ticks[0]
