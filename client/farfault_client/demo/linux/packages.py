"""Files out of Debian packages, without installing any: downloaded by apt, unpacked by dpkg-deb, kept in the cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from farfault_cli.errors import FarfaultError

COMMAND_TIMEOUT_S = 300.0
"""Of one apt or dpkg command; the kernel package is 27 MB."""


def cache_directory() -> Path:
    """Where downloaded and built files stay: ``$XDG_CACHE_HOME/farfault``, by default ``~/.cache/farfault``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "farfault"


def with_fresh_lists(fetch: Callable[[], Path], name: str) -> Path:
    """What ``fetch`` returns; when it fails, root renews apt's package lists and it gets a second try.

    A new container has no lists, and old lists name packages that the archive no longer has.
    """
    try:
        return fetch()
    except FarfaultError:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
    _run(["apt-get", "update", "-qq"], name)
    return fetch()


def dependencies(name: str) -> list[str]:
    """What the newest version of a package that apt knows depends on.

    Raises:
        FarfaultError: no apt, or no such package.
    """
    output = _run(["apt-cache", "depends", "--important", name], name)
    return re.findall(r"^\s*Depends: (\S+)$", output, re.MULTILINE)


def unpacked_package(name: str, cache: Path) -> Path:
    """The unpacked tree of a package; downloaded when it is not in the cache.

    Args:
        name: a package that apt knows.
        cache: directory to keep the tree in.

    Raises:
        FarfaultError: no apt, no network, or no such package. Its remedy names the package to install.
    """
    tree = cache / "packages" / name
    if tree.is_dir():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{name}-", dir=tree.parent) as scratch:
        unpacked = Path(scratch, "tree")
        _run(["apt-get", "download", name], name, Path(scratch))
        (archive,) = Path(scratch).glob("*.deb")
        _run(["dpkg-deb", "-x", str(archive), str(unpacked)], name)
        try:
            unpacked.rename(tree)
        except OSError:
            if not tree.is_dir():  # else somebody else was first
                raise
    return tree


def packages_in(cache: Path, pattern: str) -> list[Path]:
    """The trees that `unpacked_package` has left in the cache, of packages whose names match the glob pattern."""
    return list((cache / "packages").glob(pattern))


def _run(argv: Sequence[str], package: str, directory: Path | None = None) -> str:
    remedy = f"as root: apt-get update && apt-get install {package}"
    if shutil.which(argv[0]) is None:
        raise FarfaultError(f"{package} is needed and {argv[0]} is not here to fetch it", f"install {package} by hand")
    try:
        done = subprocess.run(
            argv,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},  # apt translates what `dependencies` reads
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise FarfaultError(f"{' '.join(argv)} took longer than {COMMAND_TIMEOUT_S} s", remedy) from None
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise FarfaultError(f"{' '.join(argv)} failed: {last}", remedy)
    return done.stdout
