"""The guest's kernel and its modules: from the host when it has a Debian cloud kernel, else out of the package."""

from __future__ import annotations

import lzma
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from farfault_cli.errors import FarfaultError

from farfault_client.demo.linux.packages import dependencies, packages_in, unpacked_package, with_fresh_lists

PACKAGE = "linux-image-cloud-amd64"
_PACKAGES = "linux-image-*-cloud-amd64"
_IMAGES = "boot/vmlinuz-*-cloud-amd64"
_DEPENDS = re.compile(rb"(?:^|\0)depends=([^\0]*)\0")


@dataclass(frozen=True)
class Kernel:
    """A kernel image (``vmlinuz``) and the directory tree of its modules."""

    image: Path
    modules: Path

    def read_module(self, name: str) -> bytes | None:
        """The module's ELF file, decompressed; None when it is built into the kernel.

        Raises:
            FarfaultError: the kernel has no such module.
        """
        file_name = re.sub("[_-]", "[_-]", name) + ".ko"
        for path in self.modules.rglob(f"{file_name}*"):
            if path.suffix == ".ko":
                return path.read_bytes()
            if path.suffix == ".xz":
                return lzma.decompress(path.read_bytes())
        built_in = (self.modules / "modules.builtin").read_text()
        if re.search(rf"/{file_name}$", built_in, re.MULTILINE):
            return None
        raise FarfaultError(f"{self.modules} has no module {name}", f"as root: apt-get install {PACKAGE}")


def find_kernel(cache: Path, root: Path = Path("/")) -> Kernel:
    """The newest cloud kernel installed under ``root``, else in the cache, else apt's, which then stays in the cache.

    Raises:
        FarfaultError: there is none and it cannot be downloaded.
    """
    for roots in ([root], packages_in(cache, _PACKAGES)):
        if found := _newest_kernel(roots):
            return found
    tree = with_fresh_lists(lambda: unpacked_package(_newest_package(), cache), PACKAGE)
    if found := _newest_kernel([tree]):
        return found
    raise FarfaultError(f"the package {tree.name} has no {_IMAGES}", f"as root: apt-get install {PACKAGE}")


def load_order(names: Iterable[str], read_module: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """The modules and all that they need, each after what it needs: name to ELF file, in the order to insert them.

    A kernel that was only unpacked has no ``modules.dep``: the needs come from each module's ``.modinfo`` section.
    """
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:  # the kernel's modules never need one another in a circle
        data = None if name in ordered else read_module(name)
        if data is None:
            return
        for needed in _needs(data):
            add(needed)
        ordered[name] = data

    for name in names:
        add(name)
    return ordered


def _newest_package() -> str:
    """The kernel that the meta package stands for, such as ``linux-image-6.1.0-56-cloud-amd64``."""
    kernels = [name for name in dependencies(PACKAGE) if name.startswith("linux-image-")]
    if not kernels:
        raise FarfaultError(f"{PACKAGE} names no kernel", f"as root: apt-get install {PACKAGE}")
    return kernels[0]


def _needs(module: bytes) -> list[str]:
    found = _DEPENDS.search(module)
    return found[1].decode().split(",") if found and found[1] else []


def _newest_kernel(roots: Iterable[Path]) -> Kernel | None:
    found = []
    for root in roots:
        for image in root.glob(_IMAGES):
            release = image.name.removeprefix("vmlinuz-")
            modules = root / "lib/modules" / release
            if modules.is_dir():
                found.append((_version_key(release), Kernel(image, modules)))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _version_key(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)]
