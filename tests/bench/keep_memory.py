"""Keeps memory ready for a benchmark on a virtual machine whose hypervisor takes free memory back.

    .venv/bin/python tests/bench/keep_memory.py --gib 14

With free page reporting (virtio-balloon) blocks of 2 MiB that are free for a few seconds are given to the hypervisor,
and the next use of each of their pages waits until it gives one back: here that is 10 us a page, more than everything
else that a page costs. This program fills so much memory, then frees every second MiB of it. What is free is then ready
to be used and in pieces too small to be reported. It holds the rest until it is ended (Ctrl-C).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from typing import Final

import click

MIB: Final = 1 << 20
PUNCH_AND_KEEP_SIZE: Final = 0x02 | 0x01  # fallocate(2): FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@click.command()
@click.option("--gib", default=8, show_default=True, help="Memory to fill; half of it is free afterwards.")
def keep(gib: int) -> None:
    """Fills memory, frees every second MiB, and holds the rest until it is ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    descriptor, mib = os.memfd_create("farfault-keep"), b"\1" * MIB
    for index in range(gib << 10):
        os.pwrite(descriptor, mib, index * MIB)
    for index in range(0, gib << 10, 2):
        if libc.fallocate(descriptor, PUNCH_AND_KEEP_SIZE, index * MIB, MIB):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    click.echo(f"{gib / 2:g} GiB are ready; end with Ctrl-C")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    keep()
