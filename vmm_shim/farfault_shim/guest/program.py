"""The guest's firmware image: find it, take the worker out of it."""

from __future__ import annotations

from pathlib import Path

from farfault_cli.errors import FarfaultError

from farfault_shim.guest.parameters import GuestParameters, Machine, worker_place
from farfault_shim.guest.verify import RamCheck, verify_ram

__all__ = ["GuestParameters", "Machine", "RamCheck", "image_path", "load_image", "verify_ram", "worker_code"]


def image_path() -> Path:
    """Where the build puts the image."""
    return Path(__file__).parent.parent / "_native" / "guest.bin"


def load_image() -> bytes:
    """The image, 64 KiB, without parameters: give it some with `GuestParameters.apply` before it runs.

    Raises:
        FarfaultError: it has not been built, or what is there is not the image.
    """
    path = image_path()
    try:
        image = path.read_bytes()
        worker_place(image)
    except FileNotFoundError:
        raise FarfaultError(f"the guest image {path} has not been built", "run: make native") from None
    except ValueError as error:
        raise FarfaultError(f"{path} is not the guest image: {error}", "run: make native") from None
    return image


def worker_code(image: bytes) -> bytes:
    """The worker's code, position independent, at most 4 KiB.

    A VMM that starts vCPUs in long mode at CPL3 puts it at `addresses.WORKER` and `GuestParameters.pack` at
    `addresses.PARAMETERS`, maps RAM one to one for the user, and enters it with rdi = vCPU index.

    Raises:
        ValueError: the image is not the guest's, or of another version.
    """
    offset, size_bytes = worker_place(image)
    return image[offset : offset + size_bytes]
