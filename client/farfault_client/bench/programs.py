"""The programs in C, baselines and the network: found beside the tests, compiled once into a cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from farfault_cli.errors import FarfaultError, PreflightError

SOURCES: Final = ("pingpong.c", "stream.c", "install.c", "pager.c", "toucher.c", "link.c")
FLAGS: Final = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
LIBRARY_FLAGS: Final = ("-shared", "-fPIC")
COMPILE_TIMEOUT_S: Final = 60.0


def source_folder() -> Path:
    """Where the sources lie: ``tests/bench/c`` of a checkout.

    Raises:
        PreflightError: this is an installed package without them.
    """
    for parent in Path(__file__).resolve().parents:
        folder = parent / "tests" / "bench" / "c"
        if folder.is_dir():
            return folder
    raise PreflightError("the programs in C are not installed", "run this command from a checkout of the repository")


def compiled() -> Path:
    """The folder with all programs, compiled where that had not been done for these very sources.

    Raises:
        PreflightError: no sources or no compiler.
        FarfaultError: the compiler refuses them.
    """
    sources = source_folder()
    compiler = shutil.which("cc")
    if compiler is None:
        raise PreflightError("there is no C compiler", "install gcc or clang")
    text = b"".join(path.read_bytes() for path in sorted(sources.glob("*.[ch]")))
    digest = hashlib.sha256(" ".join(FLAGS).encode() + text).hexdigest()[:16]
    folder = _cache() / f"bench-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        _compile(compiler, sources / source, folder)
    return folder


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farfault"


def _compile(compiler: str, source: Path, folder: Path) -> None:
    is_library = source.stem == "toucher"
    target = folder / (source.stem + ".so" if is_library else source.stem)
    if target.exists():
        return
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    command = [compiler, *FLAGS, *(LIBRARY_FLAGS if is_library else ()), "-o", str(unfinished), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    if done.returncode:
        raise FarfaultError(f"{source} cannot be compiled:\n{done.stderr}")
    unfinished.replace(target)
