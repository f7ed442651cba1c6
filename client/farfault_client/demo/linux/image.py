"""The guest's files: kernel, initramfs, disk. Built without root and without installing anything, kept in the cache.

Built files are named by their content: equal inputs give the same files, and two builders at once do no harm.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from tempfile import NamedTemporaryFile

from farfault_cli.errors import FarfaultError

from farfault_client.demo.linux import cpio
from farfault_client.demo.linux.kernel import Kernel, find_kernel, load_order
from farfault_client.demo.linux.packages import cache_directory, unpacked_package, with_fresh_lists
from farfault_client.demo.linux.worker import build_worker

MIB = 1 << 20
DISK_MIB = 8
DISK_PART_MIB = 2
"""What the guest reads at once, once a second."""

DISK_SEED = 7
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_rng")
BUSYBOX_PACKAGE = "busybox-static"
_PT_INTERP = 3
_ELF64_PHOFF = slice(32, 40)
_ELF64_PHENTSIZE = slice(54, 56)
_ELF64_PHNUM = slice(56, 58)


@dataclass(frozen=True)
class GuestImage:
    """The files that a guest starts from.

    Attributes:
        kernel: bzImage.
        initramfs: cpio archive, not compressed: an emulated CPU unpacks slowly.
        disk: raw read-only image, `DISK_MIB`.
        worker: the memory worker, to run on the host as the oracle.
    """

    kernel: Path
    initramfs: Path
    disk: Path
    worker: Path


def build_image(cache: Path | None = None) -> GuestImage:
    """Finds or downloads what the guest needs and puts it together.

    Args:
        cache: where downloads and built files stay, by default `cache_directory`.

    Raises:
        FarfaultError: something is missing and cannot be fetched; its remedy says what to install.
    """
    cache = cache or cache_directory()
    kernel = find_kernel(cache)
    worker = build_worker(cache)
    disk = disk_contents()
    initramfs = _initramfs(kernel, find_busybox(cache).read_bytes(), worker.read_bytes(), disk)
    return GuestImage(
        kernel=kernel.image,
        initramfs=_keep(cache, "initramfs", ".cpio", initramfs),
        disk=_keep(cache, "disk", ".img", disk),
        worker=worker,
    )


def disk_contents() -> bytes:
    """The disk's pseudo-random bytes, the same on every machine."""
    return random.Random(DISK_SEED).randbytes(DISK_MIB * MIB)


def find_busybox(cache: Path) -> Path:
    """A busybox that needs no libraries: the installed one, else the packaged one, kept in the cache.

    Raises:
        FarfaultError: there is none and it cannot be downloaded.
    """
    installed = shutil.which("busybox")
    if installed and is_static(Path(installed).read_bytes()):
        return Path(installed)
    tree = with_fresh_lists(lambda: unpacked_package(BUSYBOX_PACKAGE, cache), BUSYBOX_PACKAGE)
    for place in ("bin/busybox", "usr/bin/busybox"):
        if (tree / place).is_file():
            return tree / place
    raise FarfaultError(f"{BUSYBOX_PACKAGE} holds no busybox", f"as root: apt-get install {BUSYBOX_PACKAGE}")


def is_static(program: bytes) -> bool:
    """Whether an x86-64 ELF program names no interpreter: it then runs without shared libraries."""
    if program[:5] != b"\x7fELF\x02":
        return False
    start, size_bytes, count = (
        int.from_bytes(program[field], "little") for field in (_ELF64_PHOFF, _ELF64_PHENTSIZE, _ELF64_PHNUM)
    )
    headers = (program[start + i * size_bytes :][:4] for i in range(count))
    return all(int.from_bytes(kind, "little") != _PT_INTERP for kind in headers)


def _initramfs(kernel: Kernel, busybox: bytes, worker: bytes, disk: bytes) -> bytes:
    scripts = files("farfault_client.demo.linux")
    modules = load_order(MODULES, kernel.read_module)
    return cpio.archive(
        [
            *(cpio.directory(path) for path in ("bin", "dev", "modules", "proc", "sys")),
            cpio.character_device("dev/console", 5, 1),
            cpio.program("bin/busybox", busybox),
            cpio.program("init", (scripts / "init.sh").read_bytes()),
            cpio.program("answer", (scripts / "answer.sh").read_bytes()),
            cpio.program("worker", worker),
            cpio.text("disk.md5", _disk_sums(disk)),
            cpio.text("modules/order", [f"{name}.ko" for name in modules]),
            *(cpio.program(f"modules/{name}.ko", data) for name, data in modules.items()),
        ]
    )


def _disk_sums(disk: bytes) -> list[str]:
    """A line for each part of the disk: first MiB, length in MiB, MD5 sum."""
    step = DISK_PART_MIB * MIB
    return [
        f"{start // MIB} {DISK_PART_MIB} {hashlib.md5(disk[start : start + step], usedforsecurity=False).hexdigest()}"
        for start in range(0, len(disk), step)
    ]


def _keep(cache: Path, name: str, suffix: str, data: bytes) -> Path:
    path = cache / "linux-guest" / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    return path
